/* Slots: who gets one, and when it is free again.
 *
 * Each ring serves its own queue of leases, in program order and on into the next program, so a ring that is full never
 * holds up another one. A slot of a lease that changed nothing is free when the compute stream is done with it; one
 * that is written back is free when its last D2H copy is over, whatever the disk still has to do.
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

/* ---- lists of slots ------------------------------------------------------------------------------------ */

void pager_list_init(pager_list *list) {
  *list = (pager_list){.head = PAGER_NONE, .tail = PAGER_NONE};
}

/* Puts `slot` after `previous`, or first. */
static void list_insert(flap_pager *pager, pager_list *list, uint32_t previous, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  s->previous = previous;
  s->next = previous == PAGER_NONE ? list->head : pager->slots[previous].next;
  if (previous == PAGER_NONE)
    list->head = slot;
  else
    pager->slots[previous].next = slot;
  if (s->next == PAGER_NONE)
    list->tail = slot;
  else
    pager->slots[s->next].previous = slot;
  list->count++;
}

void pager_list_append(flap_pager *pager, pager_list *list, uint32_t slot) {
  list_insert(pager, list, list->tail, slot);
}

void pager_list_insert_by_order(flap_pager *pager, pager_list *list, uint32_t slot) {
  uint32_t previous = list->tail;
  while (previous != PAGER_NONE && pager->slots[previous].order > pager->slots[slot].order)
    previous = pager->slots[previous].previous;
  list_insert(pager, list, previous, slot);
}

void pager_list_remove(flap_pager *pager, pager_list *list, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  flap_assert(list->count > 0);
  if (s->previous == PAGER_NONE)
    list->head = s->next;
  else
    pager->slots[s->previous].next = s->next;
  if (s->next == PAGER_NONE)
    list->tail = s->previous;
  else
    pager->slots[s->next].previous = s->previous;
  list->count--;
}

/* ---- slots -------------------------------------------------------------------------------------------- */

uint64_t pager_rings_next_order(const flap_pager *pager, uint32_t ring) {
  return pager_order_of(pager, pager->rings[ring].queue_head);
}

uint32_t pager_rings_next_slot(const flap_pager *pager, uint32_t ring) {
  const pager_ring *r = &pager->rings[ring];
  if (r->queue_head == PAGER_NONE)
    return PAGER_NONE;
  if (r->free.head == PAGER_NONE && r->borrowed > 0)
    return pager_loan_slot(pager, pager_rings_next_order(pager, ring));
  return r->free.head;
}

static void take(flap_pager *pager, uint32_t slot) {
  if (pager->slots[slot].loan == PAGER_NONE)
    pager_list_remove(pager, &pager->rings[pager->slots[slot].ring].free, slot);
  else
    pager_loan_take(pager, slot);
}

static void give_back(flap_pager *pager, uint32_t slot) {
  pager->slots[slot].state = SLOT_FREE;
  if (pager->slots[slot].loan == PAGER_NONE)
    pager_list_append(pager, &pager->rings[pager->slots[slot].ring].free, slot);
  else
    pager_loan_give_back(pager, slot);
}

static void assign(flap_pager *pager, pager_ring *ring, uint32_t slot) {
  uint32_t index = ring->queue_head;
  pager_lease *lease = &pager->leases[index];
  ring->queue_head = lease->next_in_ring;
  if (ring->queue_head == PAGER_NONE)
    ring->queue_tail = PAGER_NONE;
  take(pager, slot);

  pager_slot *s = &pager->slots[slot];
  flap_assert(s->state == SLOT_FREE && s->copies_left == 0 && s->ready == PAGER_NONE);
  uint32_t number;
  const pager_program *program = pager_program_of(pager, index, &number);
  const bool kept = s->keeps && s->order >= program->first_order && s->change == lease->change;
  const flap_lease *what = &program->leases[number];
  const pager_region *region = &pager->regions[what->region];
  lease->slot = slot;
  s->order = pager_order_of(pager, index);
  s->region = what->region;
  s->mode = (uint8_t)what->mode;
  s->keeps = ring->keeps;
  s->change = lease->change;
  s->ram_next = 0;
  s->disk_next = region->ram_pages;
  pager_loads_hand_over(pager, index, slot);
  flap_assert(!ring->keeps || what->mode == FLAP_LEASE_READ);
  if (pager_loads(what->mode) && !kept) {
    s->pages_left = region->page_count;
    s->state = SLOT_LOADING;
    pager_list_insert_by_order(pager, &pager->loading, slot);
    pager_loads_look(pager, slot);
  } else {
    s->pages_left = 0;
    s->state = SLOT_LOADED;
  }
}

bool pager_rings_assign(flap_pager *pager) {
  bool progress = false;
  for (uint32_t i = 0; i < pager->ring_count; i++)
    for (uint32_t slot; (slot = pager_rings_next_slot(pager, i)) != PAGER_NONE; progress = true)
      assign(pager, &pager->rings[i], slot);
  return progress;
}

/* The compute stream is first in, first out: what was unpinned first is over first. */
bool pager_rings_release(flap_pager *pager) {
  bool progress = false;
  while (pager->released.count > 0) {
    uint32_t slot = pager->released.head;
    pager_slot *s = &pager->slots[slot];
    /* The last use came after the load, but the lane may not have been looked at since. */
    if (s->copies_left > 0 || !flap_device_event_done(pager->device, pager_use_event(slot)))
      break;
    pager_list_remove(pager, &pager->released, slot);
    progress = true;
    if (pager_stores(s->mode)) {
      s->state = SLOT_STORING;
      s->ram_next = 0;
      s->disk_next = pager->regions[s->region].ram_pages;
      pager_list_append(pager, &pager->storing, slot);
      pager->storing_ram += pager->regions[s->region].ram_pages > 0;
    } else {
      give_back(pager, slot);
    }
  }
  return progress;
}

void pager_rings_stored(flap_pager *pager, uint32_t slot) {
  pager_slot *s = &pager->slots[slot];
  const pager_region *region = &pager->regions[s->region];
  if (s->copies_left > 0 || s->ram_next < region->ram_pages || s->disk_next < region->page_count)
    return;
  pager_list_remove(pager, &pager->storing, slot);
  pager_count_store(pager, region, false);
  give_back(pager, slot);
}
