/* Lerps many tensors block by block, each block in all tracks, so that each live value is read from memory once.
 *
 * Macros at compile time: LIVE and STORED, the types of live values and averages, each one of float, double, half or
 * bfloat; WIDE, the type of the arithmetic: double for double averages, else float; HALF if one of the types is half,
 * which not every compiler supports; and for bfloat averages STOCHASTIC or COMPENSATED, the two ways of rounding.py. */

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
/* Every NaN becomes this one: adding to the bits of other NaNs could overflow into infinities or numbers. */
static inline uint32_t safe_bits_of(float x) { return x != x ? 0x7FC00000 : bits_of(x); }

static inline float wide_float(float x) { return x; }
static inline double wide_double(double x) { return x; }
static inline float wide_bfloat(bfloat x) { return of_bits((uint32_t)x.bits << 16); }

static inline float stored_float(float x) { return x; }
static inline double stored_double(double x) { return x; }
static inline bfloat stored_bfloat(float x) { /* rounds to nearest, ties to even */
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

/* The part of one tensor that the loops below process in one track. */
typedef struct {
    const LIVE *restrict values;
    STORED *restrict averages;
    int16_t *restrict residuals;
    uint32_t counter; /* `mix32(t ^ key)` of random_bits.py plus the global index of the first element */
    int64_t count;
} Block;

#define VALUE(i) ((WIDE)OF(wide, LIVE)(block.values[i]))
#if defined STOCHASTIC
#define AVERAGE(i) OF(wide, STORED)(block.averages[i])
#define STORE(i, x) (block.averages[i].bits = (safe_bits_of(x) + (mix32(block.counter + (uint32_t)(i)) & 0xFFFF)) >> 16)
#elif defined COMPENSATED
#define AVERAGE(i) of_bits(((uint32_t)block.averages[i].bits << 16) + (uint32_t)(int32_t)block.residuals[i])
#define STORE(i, x) \
    do { \
        uint32_t bits = safe_bits_of(x); \
        block.averages[i].bits = (bits + 0x8000) >> 16; \
        block.residuals[i] = (int16_t)bits; \
    } while (0)
#else
#define AVERAGE(i) OF(wide, STORED)(block.averages[i])
#define STORE(i, x) (block.averages[i] = OF(stored, STORED)(x))
#endif

static void copy(const Block block) {
    for (int64_t i = 0; i < block.count; i++) STORE(i, VALUE(i));
}

/* The formula of torch.lerp: from the nearer end, with one rounding. */
static void lerp(const Block block, WIDE weight) {
    if (weight < (WIDE)0.5)
        for (int64_t i = 0; i < block.count; i++)
            STORE(i, OF(fma, WIDE)(weight, VALUE(i) - AVERAGE(i), AVERAGE(i)));
    else
        for (int64_t i = 0; i < block.count; i++)
            STORE(i, OF(fma, WIDE)(weight - 1, VALUE(i) - AVERAGE(i), VALUE(i)));
}

/* An average that would become infinite or NaN takes the value. */
static void lerp_nonfinite(const Block block, WIDE weight) {
    int near = weight < (WIDE)0.5;
    WIDE factor = near ? weight : weight - 1;
    for (int64_t i = 0; i < block.count; i++) {
        WIDE value = VALUE(i), average = AVERAGE(i);
        WIDE result = OF(fma, WIDE)(factor, value - average, near ? average : value);
        result = result - result == 0 ? result : value;
        STORE(i, result);
    }
}

/* Processes the blocks from begin to end. The arguments are the tables of address_tables.py, the tables of
 * random_bits.py (only STOCHASTIC reads them), the weight of each track, the number of the update, and the sizes of the
 * tables. */
void lerp_tracks(const int64_t *value_addresses, const int64_t *average_addresses, const int64_t *sizes,
                 const int32_t *block_tensors, const int64_t *block_starts, const uint32_t *tensor_hashes,
                 const uint32_t *global_offsets, const uint32_t *track_seeds, const double *weights,
                 int64_t update_index, int64_t tensor_count, int64_t track_count, int64_t finite, int64_t block_size,
                 int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
        int64_t tensor = block_tensors[index], start = block_starts[index], remaining = sizes[tensor] - start;
        Block block = {.values = (const LIVE *)(intptr_t)value_addresses[tensor] + start,
                       .count = remaining < block_size ? remaining : block_size};
        for (int64_t track = 0; track < track_count; track++) {
            block.averages = (STORED *)(intptr_t)average_addresses[track * tensor_count + tensor] + start;
#ifdef COMPENSATED
            int64_t column = track_count + track;
            block.residuals = (int16_t *)(intptr_t)average_addresses[column * tensor_count + tensor] + start;
#endif
#ifdef STOCHASTIC
            uint32_t key = mix32((uint32_t)update_index + track_seeds[track]);
            block.counter = mix32(tensor_hashes[tensor] ^ key) + global_offsets[tensor] + (uint32_t)start;
#endif
            if (weights[track] >= 1)
                copy(block);
            else if (weights[track] > 0 && finite)
                lerp(block, (WIDE)weights[track]);
            else if (weights[track] > 0)
                lerp_nonfinite(block, (WIDE)weights[track]);
        }
    }
}
