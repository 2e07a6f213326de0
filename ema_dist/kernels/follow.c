/* Moves blocks of many tensors by all tracks, so that each live value is read from memory once.
 *
 * Compiled with LIVE and STORED, the types of live values and averages, each one of float, double, half, bfloat,
 * WIDE, the type in which averages move: double for double, else float; and HALF if one of them is half, as not every
 * compiler has it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint16_t bits; } bfloat;

static inline float wide_float(float x) { return x; }
static inline double wide_double(double x) { return x; }
static inline float wide_bfloat(bfloat x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline float stored_float(float x) { return x; }
static inline double stored_double(double x) { return x; }
static inline bfloat stored_bfloat(float x) { /* to nearest, ties to even; NaN keep from becoming infinities */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    bfloat narrow = {(uint16_t)(x != x ? 0x7FC0 : rounded)};
    return narrow;
}

#ifdef HALF
typedef _Float16 half;
static inline float wide_half(half x) { return (float)x; }
static inline half stored_half(float x) { return (half)x; }
#endif

static inline float fma_float(float x, float y, float z) { return fmaf(x, y, z); }
static inline double fma_double(double x, double y, double z) { return fma(x, y, z); }

#define JOINED(x, y) x##_##y
#define OF(function, type) JOINED(function, type)
#define VALUE(i) ((WIDE)OF(wide, LIVE)(values[i]))
#define AVERAGE(i) OF(wide, STORED)(averages[i])
#define STORE(i, x) (averages[i] = OF(stored, STORED)(x))

static void copy(STORED *restrict averages, const LIVE *restrict values, int64_t count) {
    for (int64_t i = 0; i < count; i++) STORE(i, VALUE(i));
}

/* What torch.lerp does: from the nearer end, in one rounding. */
static void move(STORED *restrict averages, const LIVE *restrict values, int64_t count, WIDE weight) {
    if (weight < (WIDE)0.5)
        for (int64_t i = 0; i < count; i++)
            STORE(i, OF(fma, WIDE)(weight, VALUE(i) - AVERAGE(i), AVERAGE(i)));
    else
        for (int64_t i = 0; i < count; i++)
            STORE(i, OF(fma, WIDE)(weight - 1, VALUE(i) - AVERAGE(i), VALUE(i)));
}

/* What would not be finite follows the value. */
static void move_carefully(STORED *restrict averages, const LIVE *restrict values, int64_t count, WIDE weight) {
    int near = weight < (WIDE)0.5;
    WIDE factor = near ? weight : weight - 1;
    for (int64_t i = 0; i < count; i++) {
        WIDE value = VALUE(i), average = AVERAGE(i);
        WIDE moved = OF(fma, WIDE)(factor, value - average, near ? average : value);
        STORE(i, moved - moved == 0 ? moved : value);
    }
}

void follow(const int64_t *value_addresses, const int64_t *average_addresses, const int64_t *sizes,
            const int32_t *block_tensors, const int64_t *block_starts, const double *weights, int64_t tensors,
            int64_t tracks, int64_t finite, int64_t block, int64_t first, int64_t last) {
    for (int64_t number = first; number < last; number++) {
        int64_t tensor = block_tensors[number], start = block_starts[number];
        int64_t rest = sizes[tensor] - start, count = rest < block ? rest : block;
        const LIVE *values = (const LIVE *)(intptr_t)value_addresses[tensor] + start;
        for (int64_t track = 0; track < tracks; track++) {
            STORED *averages = (STORED *)(intptr_t)average_addresses[track * tensors + tensor] + start;
            if (weights[track] >= 1)
                copy(averages, values, count);
            else if (weights[track] > 0 && finite)
                move(averages, values, count, (WIDE)weights[track]);
            else if (weights[track] > 0)
                move_carefully(averages, values, count, (WIDE)weights[track]);
        }
    }
}
