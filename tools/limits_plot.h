/* Plots of sections as SVG inside HTML, and text for both. Private to the page of `flap bench`.
 *
 * Colours are classes (c0 to c5) that the page's style sheet gives for light and dark. A plot is 420 units wide, so
 * that its letters can be read on a phone.
 */
#ifndef FLAP_TOOLS_LIMITS_PLOT_H
#define FLAP_TOOLS_LIMITS_PLOT_H

#include "tools/limits.h"

#ifdef __cplusplus
extern "C" {
#endif

/* With &, <, > and quotes as entities. */
void flap_plot_text(FILE *out, const char *text);
/* The names of the series with their colours. */
void flap_plot_legend(FILE *out, const char *const *names, uint32_t count);
/* Lines over a logarithmic x, or groups of bars, as the section's axis says. */
void flap_plot_section(FILE *out, const flap_limits_section *section);

#define FLAP_PLOT_LANES_MAX (FLAP_LANE_COUNT + 1)
/* The lanes of a roofline of this machine, in the order of colours; returns how many there are. */
uint32_t flap_plot_roofline_lanes(const flap_machine *machine, const char *names_out[FLAP_PLOT_LANES_MAX]);
/* Operations per byte against operations per second: a roof for each lane of the machine, and, of a plan (or NULL), a
 * point for each lane where its step is. */
void flap_plot_roofline(FILE *out, const flap_machine *machine, const flap_plan *plan);

#ifdef __cplusplus
}
#endif
#endif
