// Checks lanes.h for one instruction set (see isa.h) and prints a hash of all results: the same hash means the same bits.
//
//   g++ -std=c++17 -O2 -ffp-contract=off -mavx2 -mfma -mf16c native/tests/lanes_check.cpp -o /tmp/lanes && /tmp/lanes
#include "isa.h"

#include "../lanes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

using namespace QWEN3VL_ISA;

static uint64_t hash = 1469598103934665603ull;
static int failures = 0;

static void mix(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
        hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
    }
}

// All NaN count as one: which of them a sum of two has is each CPU's own choice.
static void mix_floats(const float* values, int count) {
    for (int i = 0; i < count; ++i) {
        const float value = values[i] == values[i] ? values[i] : 123456.0f;
        mix(&value, sizeof value);
    }
}

static void mix_lanes(Lanes a) {
    float values[16];
    store(values, a);
    mix_floats(values, 16);
}

static void expect(bool is_right, const char* what) {
    if (!is_right) {
        printf("failed: %s\n", what);
        ++failures;
    }
}

static uint32_t state = 12345;
static uint32_t random_bits() {
    state = state * 1664525u + 1013904223u;
    return state ^ (state >> 13);
}
static float random_float(float range) { return (static_cast<float>(random_bits() >> 8) / 8388608.0f - 1.0f) * range; }

static const float special[16] = {0.0f,     -0.0f,  1.0f,   -1.0f,     INFINITY,  -INFINITY, NAN,    1e-40f,
                                  65504.0f, 65520.0f, -7e4f, 5.9604645e-8f, 2.9802322e-8f, 0.5f, 127.5f, -128.5f};

static void fill(float* values) {
    for (int i = 0; i < 16; ++i) {
        values[i] = random_bits() % 8 == 0 ? special[random_bits() % 16] : random_float(random_bits() % 2 ? 3.0f : 300.0f);
    }
}

static void check_arithmetic() {
    for (int round = 0; round < 20000; ++round) {
        float x[17], y[17], z[17];
        fill(x + 1);
        fill(y + 1);
        fill(z + 1);
        const Lanes a = load(x + 1), b = load(y + 1), c = load(z + 1);
        mix_lanes(add(a, b));
        mix_lanes(sub(a, b));
        mix_lanes(add(mul(a, b), c));
        mix_lanes(div(a, b));
        mix_lanes(fma(a, b, c));
        mix_lanes(max(a, b));
        mix_lanes(max_number(a, b));
        mix_lanes(min_number(a, b));
        mix_lanes(abs(a));
        mix_lanes(sqrt(abs(a)));
        const int n = static_cast<int>(random_bits() % 17);
        mix_lanes(first_n(n, a, b));
        mix_lanes(load_n(x + 1, n));
        store_n(y + 1, a, n);
        mix_floats(y + 1, 16);
        const float reduced[2] = {reduce_add(a), reduce_max(a)};
        mix_floats(reduced, 2);
        bool has_nan = false;
        float largest = -INFINITY;
        for (int i = 1; i < 17; ++i) {
            has_nan = has_nan || x[i] != x[i];
            largest = x[i] > largest ? x[i] : largest;
        }
        expect(has_nan ? reduced[1] != reduced[1] : reduced[1] == largest, "reduce_max");
        const Lanes inside = max_number(min_number(a, broadcast(1e6f)), broadcast(-1e6f));
        mix_lanes(round_to_even(inside));
        int32_t whole[16];
        store_int(whole, to_int(inside));
        mix(whole, sizeof whole);
        mix_lanes(to_float(load_int(whole)));
    }
}

static void check_exp() {
    double worst = 0;
    for (float x = -104.5f; x < 89.5f; x += 0.00091f) {
        float values[16];
        store(values, exp(broadcast(x)));
        mix_floats(values, 1);
        const double right = ::exp(static_cast<double>(x));
        if (right > 1.18e-38 && right < 3.4e38) {
            const double ulp = static_cast<double>(nextafterf(static_cast<float>(right), INFINITY)) - static_cast<float>(right);
            const double error = fabs(values[0] - right) / ulp;
            worst = error > worst ? error : worst;
        } else if (right >= 3.403e38) {
            expect(values[0] == INFINITY, "exp of a large number is infinite");
        } else if (right <= 1.18e-38) {
            expect(fabs(values[0] - right) <= 2.9e-45, "exp of a low number is subnormal or zero");
        }
    }
    printf("exp: largest error %.3f ulp\n", worst);
    expect(worst <= 2.0, "exp within 2 ulp");
    float values[16];
    store(values, exp(load(special)));
    mix_floats(values, 16);
    expect(values[0] == 1.0f && values[1] == 1.0f, "exp(0) is 1");
    expect(values[4] == INFINITY && values[5] == 0.0f && values[6] != values[6], "exp of infinities and NaN");
}

static void check_float16() {
    for (uint32_t first = 0; first < 65536; first += 16) {
        uint16_t halves[17], back[17];
        for (int i = 0; i < 16; ++i) {
            halves[i + 1] = static_cast<uint16_t>(first + i);
        }
        const Lanes a = load_float16(halves + 1);
        mix_lanes(a);
        store_float16(back + 1, a);
        for (int i = 1; i < 17; ++i) {
            const uint32_t magnitude = halves[i] & 0x7fff;
            const bool is_same = magnitude == 0x7c00 ? back[i] == (halves[i] & 0x8000) + 0x7bff
                                 : magnitude > 0x7c00 ? (back[i] & 0x7fff) > 0x7c00
                                                      : back[i] == halves[i];
            expect(is_same, "float16 to float32 and back");
        }
        mix_lanes(load_bfloat16(halves + 1));
    }
    for (uint32_t bits = 0x32000000; bits < 0x48000000; bits += 997 * 16) {
        float values[16];
        for (int i = 0; i < 16; ++i) {
            const uint32_t signed_bits = (bits + 997 * i) | (i % 2 ? 0x80000000 : 0);
            memcpy(&values[i], &signed_bits, 4);
        }
        uint16_t halves[16];
        store_float16(halves, load(values));
        mix(halves, sizeof halves);
        float back[16];
        store(back, load_float16(halves));
        for (int i = 0; i < 16; ++i) {
            const double step = fmax(ldexp(1.0, ilogb(values[i]) - 10), ldexp(1.0, -24));
            const double right = fmax(fmin(values[i], 65504.0), -65504.0);
            expect(fabs(back[i] - right) <= step / 2, "float16 rounded to the nearest");
        }
    }
    for (uint32_t half = 0; half < 0x7bff; ++half) {  // ties go to even
        float pair[16] = {};
        uint16_t codes[16] = {static_cast<uint16_t>(half), static_cast<uint16_t>(half + 1)};
        store(pair, load_float16(codes));
        store_float16(codes, broadcast((pair[0] + pair[1]) / 2));
        expect(codes[0] == ((half + 1) & ~1u), "float16 ties to even");
    }
}

static void check_codes() {
    for (int round = 0; round < 20000; ++round) {
        float values[16];
        fill(values);
        int8_t codes[17];
        uint8_t pairs[9];
        store_int8(codes + 1, load(values));
        mix(codes + 1, 16);
        mix_lanes(load_int8(codes + 1));
        float unsigned_codes[16];
        store(unsigned_codes, load_uint8(reinterpret_cast<const uint8_t*>(codes + 1)));
        store_int4(pairs + 1, load(values));
        mix(pairs + 1, 8);
        float back[16];
        store(back, load_int4(pairs + 1));
        for (int i = 0; i < 16; ++i) {
            const bool is_nan = values[i] != values[i];
            expect(codes[i + 1] == (is_nan ? -128 : rintf(fmaxf(fminf(values[i], 127), -128))), "int8");
            expect(unsigned_codes[i] == static_cast<uint8_t>(codes[i + 1]), "uint8");
            expect(back[i] == (is_nan ? -8 : rintf(fmaxf(fminf(values[i], 7), -8))), "int4");
        }
    }
}

static void check_transpose() {
    float from[16][16], to[16][16];
    Lanes rows[16];
    for (int i = 0; i < 16; ++i) {
        fill(from[i]);
        rows[i] = load(from[i]);
    }
    float sums[16];
    store(sums, reduce_add_16(rows));
    for (int i = 0; i < 16; ++i) {
        const float sum = reduce_add(rows[i]);
        expect(sum != sum ? sums[i] != sums[i] : sums[i] == sum, "reduce_add_16");
    }
    transpose(rows);
    for (int i = 0; i < 16; ++i) {
        store(to[i], rows[i]);
    }
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {
            expect(memcmp(&from[i][j], &to[j][i], sizeof(float)) == 0, "transpose");
        }
    }
}

int main() {
    for (int round = 0; round < 100; ++round) {
        check_transpose();
    }
    check_arithmetic();
    check_exp();
    check_float16();
    check_codes();
    printf("%s: %d failures, hash %016llx\n", TEST_TEXT(QWEN3VL_ISA), failures, static_cast<unsigned long long>(hash));
    return failures != 0;
}
