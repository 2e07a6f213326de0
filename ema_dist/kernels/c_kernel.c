/* Moves blocks of many tensors by all tracks, so that each live value is read from memory once.
 *
 * Compiled with LIVE and STORED, the types of live values and averages, each one of float, double, half, bfloat;
 * WIDE, the type in which averages move: double for double, else float; HALF if one of them is half, as not every
 * compiler has it; and for bfloat averages perhaps STOCHASTIC or COMPENSATED, as rounding.py has them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint16_t bits; } bfloat;

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
/* The one NaN that is kept where bits are added: others would run over into infinities or numbers. */
static inline uint32_t safe_bits_of(float x) { return x != x ? 0x7FC00000 : bits_of(x); }

static inline float wide_float(float x) { return x; }
static inline double wide_double(double x) { return x; }
static inline float wide_bfloat(bfloat x) { return of_bits((uint32_t)x.bits << 16); }

static inline float stored_float(float x) { return x; }
static inline double stored_double(double x) { return x; }
static inline bfloat stored_bfloat(float x) { /* to nearest, ties to even */
    uint32_t bits = safe_bits_of(x);
    return (bfloat){(uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

#ifdef HALF
typedef _Float16 half;
static inline float wide_half(half x) { return (float)x; }
static inline half stored_half(float x) { return (half)x; }
#endif

static inline float fma_float(float x, float y, float z) { return fmaf(x, y, z); }
static inline double fma_double(double x, double y, double z) { return fma(x, y, z); }

/* `mix32` of random_bits.py. */
static inline uint32_t mix32(uint32_t bits) {
    bits = (bits ^ bits >> 16) * 0x7FEB352D;
    bits = (bits ^ bits >> 15) * 0x846CA68B;
    return bits ^ bits >> 16;
}

#define JOINED(x, y) x##_##y
#define OF(function, type) JOINED(function, type)

/* What the loops below work on. */
typedef struct {
    const LIVE *restrict values;
    STORED *restrict averages;
    int16_t *restrict residuals;
    uint32_t place; /* of the first element, mixed with the key */
    int64_t count;
} Run;

#define VALUE(i) ((WIDE)OF(wide, LIVE)(run.values[i]))
#if defined STOCHASTIC
#define AVERAGE(i) OF(wide, STORED)(run.averages[i])
#define STORE(i, x) (run.averages[i].bits = (safe_bits_of(x) + (mix32(run.place + (uint32_t)(i)) & 0xFFFF)) >> 16)
#elif defined COMPENSATED
#define AVERAGE(i) of_bits(((uint32_t)run.averages[i].bits << 16) + (uint32_t)(int32_t)run.residuals[i])
#define STORE(i, x) \
    do { \
        uint32_t bits = safe_bits_of(x); \
        run.averages[i].bits = (bits + 0x8000) >> 16; \
        run.residuals[i] = (int16_t)bits; \
    } while (0)
#else
#define AVERAGE(i) OF(wide, STORED)(run.averages[i])
#define STORE(i, x) (run.averages[i] = OF(stored, STORED)(x))
#endif

static void copy(const Run run) {
    for (int64_t i = 0; i < run.count; i++) STORE(i, VALUE(i));
}

/* What torch.lerp does: from the nearer end, in one rounding. */
static void move(const Run run, WIDE weight) {
    if (weight < (WIDE)0.5)
        for (int64_t i = 0; i < run.count; i++)
            STORE(i, OF(fma, WIDE)(weight, VALUE(i) - AVERAGE(i), AVERAGE(i)));
    else
        for (int64_t i = 0; i < run.count; i++)
            STORE(i, OF(fma, WIDE)(weight - 1, VALUE(i) - AVERAGE(i), VALUE(i)));
}

/* What would not be finite follows the value. */
static void move_carefully(const Run run, WIDE weight) {
    int near = weight < (WIDE)0.5;
    WIDE factor = near ? weight : weight - 1;
    for (int64_t i = 0; i < run.count; i++) {
        WIDE value = VALUE(i), average = AVERAGE(i);
        WIDE moved = OF(fma, WIDE)(factor, value - average, near ? average : value);
        moved = moved - moved == 0 ? moved : value;
        STORE(i, moved);
    }
}

/* The tables of tables.py, and of noise.py (only STOCHASTIC reads these); the weight of each track; the number of the
 * update; how many tensors and tracks there are; and which blocks to move. */
void lerp_tracks(const int64_t *value_addresses, const int64_t *average_addresses, const int64_t *sizes,
            const int32_t *block_tensors, const int64_t *block_starts, const uint32_t *names, const uint32_t *firsts,
            const uint32_t *seeds, const double *weights, int64_t update, int64_t tensors, int64_t tracks,
            int64_t finite, int64_t block, int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; number++) {
        int64_t tensor = block_tensors[number], start = block_starts[number], rest = sizes[tensor] - start;
        Run run = {.values = (const LIVE *)(intptr_t)value_addresses[tensor] + start,
                   .count = rest < block ? rest : block};
        for (int64_t track = 0; track < tracks; track++) {
            run.averages = (STORED *)(intptr_t)average_addresses[track * tensors + tensor] + start;
#ifdef COMPENSATED
            run.residuals = (int16_t *)(intptr_t)average_addresses[(tracks + track) * tensors + tensor] + start;
#endif
#ifdef STOCHASTIC
            run.place = mix32(names[tensor] ^ mix32((uint32_t)update + seeds[track])) + firsts[tensor] + (uint32_t)start;
#endif
            if (weights[track] >= 1)
                copy(run);
            else if (weights[track] > 0 && finite)
                move(run, (WIDE)weights[track]);
            else if (weights[track] > 0)
                move_carefully(run, (WIDE)weights[track]);
        }
    }
}
