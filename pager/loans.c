/* Loans: residents that hold nothing for a part of a step lend their memory to the ring that borrows.
 *
 * A lender's memory is cut into slots of that ring. They serve only leases that come before the lender's next one, so
 * whatever is in them is pinned and unpinned before it: when that next lease is pinned, it waits for no more than the
 * end of their use and for their bytes on the way home.
 *
 *   resident: closed ──unpin, and it holds nothing──► used ──its last use is over──► open
 *               ▲                                      │                              │
 *               └──────────────── pin, once nothing of it is lent ────────────────────┘
 */
#include "pager/pager_internal.h"

#include "base/assert.h"

static flap_event use_event(const flap_pager *pager, uint32_t loan) {
  return 2 * pager->slot_count + PAGER_MARKS + 1 + loan;
}

static uint64_t next_order(const flap_pager *pager, const pager_loan *loan) {
  return pager_order_of(pager, loan->queue_head);
}

/* ---- lists of loans ------------------------------------------------------------------------------------ */

/* Puts a loan after `previous`, or first. */
static void list_insert(flap_pager *pager, pager_list *list, uint32_t previous, uint32_t index) {
  pager_loan *loan = &pager->loans[index];
  loan->previous = previous;
  loan->next = previous == PAGER_NONE ? list->head : pager->loans[previous].next;
  *(loan->previous == PAGER_NONE ? &list->head : &pager->loans[loan->previous].next) = index;
  *(loan->next == PAGER_NONE ? &list->tail : &pager->loans[loan->next].previous) = index;
  list->count++;
}

static void list_remove(flap_pager *pager, pager_list *list, uint32_t index) {
  const pager_loan *loan = &pager->loans[index];
  flap_assert(list->count > 0);
  *(loan->previous == PAGER_NONE ? &list->head : &pager->loans[loan->previous].next) = loan->next;
  *(loan->next == PAGER_NONE ? &list->tail : &pager->loans[loan->next].previous) = loan->previous;
  list->count--;
}

/* Those that lend and have a free slot, the one that is needed last first. Residents come free in the backward, those
 * that the next forward needs first at the end: so most often this is the end of the list. */
static void offer(flap_pager *pager, uint32_t index) {
  const uint64_t order = next_order(pager, &pager->loans[index]);
  uint32_t previous = pager->offered.tail;
  while (previous != PAGER_NONE && next_order(pager, &pager->loans[previous]) < order)
    previous = pager->loans[previous].previous;
  list_insert(pager, &pager->offered, previous, index);
}

static bool is_offered(const pager_loan *loan) {
  return loan->state == LOAN_OPEN && loan->free.count > 0;
}

/* ---- what is lent -------------------------------------------------------------------------------------- */

static bool is_whole(const pager_loan *loan) {
  return loan->free.count == loan->slots;
}

static void use_begins(flap_pager *pager, uint32_t index) {
  flap_device_event_record(pager->device, use_event(pager, index), FLAP_STREAM_COMPUTE, true);
  pager->loans[index].state = LOAN_USED;
  list_insert(pager, &pager->used, pager->used.tail, index);
}

static void close_loan(flap_pager *pager, uint32_t index) {
  pager_loan *loan = &pager->loans[index];
  flap_assert(is_whole(loan));
  if (loan->state == LOAN_USED)
    list_remove(pager, &pager->used, index);
  if (loan->state == LOAN_OPEN)
    list_remove(pager, &pager->offered, index);
  loan->state = LOAN_CLOSED;
}

uint32_t pager_loan_slot(const flap_pager *pager, uint64_t order) {
  const uint32_t index = pager->offered.head;
  return index == PAGER_NONE || next_order(pager, &pager->loans[index]) <= order ? PAGER_NONE
                                                                                 : pager->loans[index].free.head;
}

void pager_loan_take(flap_pager *pager, uint32_t slot) {
  const uint32_t index = pager->slots[slot].loan;
  pager_loan *loan = &pager->loans[index];
  flap_assert(is_offered(loan));
  pager_list_remove(pager, &loan->free, slot);
  if (!is_offered(loan))
    list_remove(pager, &pager->offered, index);
}

void pager_loan_give_back(flap_pager *pager, uint32_t slot) {
  const uint32_t index = pager->slots[slot].loan;
  pager_loan *loan = &pager->loans[index];
  flap_assert(loan->state == LOAN_OPEN);
  pager_list_append(pager, &loan->free, slot);
  if (loan->free.count == 1)
    offer(pager, index);
}

bool pager_loan_is_lent(const flap_pager *pager, uint32_t index) {
  return !is_whole(&pager->loans[index]);
}

bool pager_loan_is_pinned(const flap_pager *pager, uint32_t index) {
  return pager->rings[pager->slots[pager->loans[index].first_slot].ring].pinned > 0;
}

/* ---- what becomes of the resident ---------------------------------------------------------------------- */

void pager_loan_queue(flap_pager *pager, uint32_t index, uint32_t lease) {
  pager_loan *loan = &pager->loans[index];
  const bool first = loan->queue_tail == PAGER_NONE;
  *(first ? &loan->queue_head : &pager->leases[loan->queue_tail].next_in_ring) = lease;
  loan->queue_tail = lease;
  if (!first || !is_offered(loan))
    return;
  list_remove(pager, &pager->offered, index); /* it is needed sooner now than never */
  offer(pager, index);
}

void pager_loan_pinned(flap_pager *pager, uint32_t index) {
  pager_loan *loan = &pager->loans[index];
  loan->queue_head = pager->leases[loan->queue_head].next_in_ring;
  if (loan->queue_head == PAGER_NONE)
    loan->queue_tail = PAGER_NONE;
  close_loan(pager, index);
}

void pager_loan_unpinned(flap_pager *pager, uint32_t index) {
  if (!pager->regions[pager->loans[index].region].holds)
    use_begins(pager, index);
}

void pager_loan_at_rest(flap_pager *pager, uint32_t index) {
  close_loan(pager, index);
  pager_loan_unpinned(pager, index);
}

void pager_loan_open(flap_pager *pager, uint32_t index) {
  pager->loans[index].state = LOAN_OPEN;
  offer(pager, index);
}

/* The compute stream is first in, first out. */
bool pager_loans_open(flap_pager *pager) {
  bool progress = false;
  for (uint32_t index; (index = pager->used.head) != PAGER_NONE; progress = true) {
    if (!flap_device_event_done(pager->device, use_event(pager, index)))
      break;
    list_remove(pager, &pager->used, index);
    pager_loan_open(pager, index);
  }
  return progress;
}
