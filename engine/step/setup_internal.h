/* Private to setups: what placing keeps account of, class by class, so that a choice that changes one class looks at
 * the regions of that class alone (places.c), and one that changes nothing of what lives in RAM at none (homes.c).
 */
#ifndef FLAP_ENGINE_STEP_SETUP_INTERNAL_H
#define FLAP_ENGINE_STEP_SETUP_INTERNAL_H

#include "engine/step/setup.h"

/* Of an overlay: how far its sides reach; of the class that is being given RAM, what share of its bytes costs nothing.
 */
typedef struct setup_room {
  uint64_t sides[2];
  double free;
} setup_room;

/* What ram_pages of a class's regions say that may live on disk. */
typedef enum setup_home { SETUP_HOME_UNKNOWN, SETUP_HOME_NOTHING, SETUP_HOME_ALL, SETUP_HOME_SOME } setup_home;

typedef struct setup_class {
  uint32_t first, end;   /* in places->regions: its regions, in order */
  uint64_t forced_bytes; /* of regions that live in RAM in any case */
  bool in_snapshots;
  /* Of an overlay are some of its regions, all on one side; then by overlay what of them has no place in VRAM. */
  bool shares;
  uint8_t side;
  uint64_t *rooms;
  /* For so many residents; the first `preferred` regions are chosen before the others. */
  bool is_chosen;
  uint64_t wanted, preferred;
  uint64_t slot_bytes, streaming;      /* the largest region that passes through the ring, and how many do */
  uint64_t resident_bytes, kept_bytes; /* in VRAM, and without copies */
  uint64_t lenders, lender_bytes;      /* residents that lend, and the smallest of them */
  uint64_t home_bytes;                 /* for RAM and disk to share */
  uint32_t ring;                       /* that its regions have; UINT32_MAX: not yet */
  /* For a size of pages; 0: for none yet. */
  uint64_t page_bytes, pages;
  /* For so much RAM. */
  setup_home home;
  uint64_t ram_bytes; /* of home_bytes */
} setup_class;

typedef struct setup_places {
  uint32_t *regions; /* class by class */
  setup_class classes[FLAP_CLASS_COUNT];
  uint32_t room_count;
  setup_room *rooms;          /* overlay n at n - 1 */
  uint64_t *forced;           /* likewise: of regions that live in RAM in any case, side 0, then side 1 of all */
  uint64_t *class_rooms;      /* of classes that share, which point into it */
  uint64_t forced_home_bytes; /* what those take */
  bool has_homes;             /* for this RAM and pages of this size, and residents as they are: */
  uint64_t ram_bytes, page_bytes, home_bytes; /* the latter as flap_pager_totals has it */
  /* What lists take of RAM, with as many events of a trace: none, and some. */
  uint64_t list_bytes[2];
  uint32_t list_events[2];
  bool has_list_bytes[2];
} setup_places;

/* places.c. NULL if there is no memory. What of regions does not depend on the choice is written. */
setup_places *setup_places_open(flap_setup *setup);
void setup_places_close(setup_places *places);
/* Residents and rings, as the choice says. */
void setup_lay_rings(flap_setup *setup);
void setup_sum_classes(flap_setup *setup);
void setup_total(const flap_setup *setup, flap_pager_totals *totals_out);

/* homes.c. Gives regions their RAM, as the choice says; residents and rings are decided. */
void setup_lay_homes(flap_setup *setup);

static inline bool setup_may_stay(const flap_layout_region *region) {
  return region->place == FLAP_PLACE_ANY || region->place == FLAP_PLACE_COPIED;
}

#endif
