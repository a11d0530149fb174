// 16 float lanes as plain arrays: any CPU. Included by lanes.h, which documents the functions.
// What has no fused multiply-add in hardware takes it from the C library, so that it, too, rounds once.

constexpr int kRegisterLanes = 4;

struct Lanes {
    float v[16];
};
struct IntLanes {
    int32_t v[16];
};

#define QWEN3VL_EACH(expression)       \
    Lanes r;                           \
    for (int i = 0; i < 16; ++i) {     \
        r.v[i] = (expression);         \
    }                                  \
    return r

QWEN3VL_INLINE Lanes load(const float* p) {
    Lanes r;
    __builtin_memcpy(r.v, p, sizeof r.v);
    return r;
}

QWEN3VL_INLINE void store(float* p, Lanes a) { __builtin_memcpy(p, a.v, sizeof a.v); }

QWEN3VL_INLINE Lanes load_n(const float* p, int n) { QWEN3VL_EACH(i < n ? p[i] : 0.0f); }

QWEN3VL_INLINE void store_n(float* p, Lanes a, int n) {
    for (int i = 0; i < n; ++i) {
        p[i] = a.v[i];
    }
}

QWEN3VL_INLINE Lanes broadcast(float x) { QWEN3VL_EACH(x); }
QWEN3VL_INLINE Lanes zero() { return broadcast(0.0f); }
QWEN3VL_INLINE Lanes add(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] + b.v[i]); }
QWEN3VL_INLINE Lanes sub(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] - b.v[i]); }
QWEN3VL_INLINE Lanes mul(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] * b.v[i]); }
QWEN3VL_INLINE Lanes div(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] / b.v[i]); }
QWEN3VL_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { QWEN3VL_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
QWEN3VL_INLINE Lanes max(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] > b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]); }
QWEN3VL_INLINE Lanes max_number(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
QWEN3VL_INLINE Lanes min_number(Lanes a, Lanes b) { QWEN3VL_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
QWEN3VL_INLINE Lanes abs(Lanes a) { QWEN3VL_EACH(__builtin_fabsf(a.v[i])); }
QWEN3VL_INLINE Lanes sqrt(Lanes a) { QWEN3VL_EACH(__builtin_sqrtf(a.v[i])); }
QWEN3VL_INLINE Lanes first_n(int n, Lanes a, Lanes b) { QWEN3VL_EACH(i < n ? a.v[i] : b.v[i]); }

// Adding 1.5 * 2^23 leaves no bits below one, rounded to even.
QWEN3VL_INLINE Lanes round_to_even(Lanes a) {
    QWEN3VL_EACH(__builtin_copysignf((a.v[i] + 12582912.0f) - 12582912.0f, a.v[i]));
}

QWEN3VL_INLINE IntLanes to_int(Lanes a) {
    const Lanes rounded = round_to_even(a);
    IntLanes r;
    for (int i = 0; i < 16; ++i) {
        r.v[i] = static_cast<int32_t>(rounded.v[i]);
    }
    return r;
}

QWEN3VL_INLINE Lanes to_float(IntLanes a) { QWEN3VL_EACH(static_cast<float>(a.v[i])); }

QWEN3VL_INLINE IntLanes load_int(const int32_t* p) {
    IntLanes r;
    __builtin_memcpy(r.v, p, sizeof r.v);
    return r;
}

QWEN3VL_INLINE void store_int(int32_t* p, IntLanes a) { __builtin_memcpy(p, a.v, sizeof a.v); }

QWEN3VL_INLINE float power_of_two(int32_t n) {
    const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
    float r;
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
}

// The factor is two powers: the first keeps the product normal, the second rounds it where it leaves the range.
QWEN3VL_INLINE Lanes scale_by_power_of_two(Lanes a, Lanes n) {
    Lanes r;
    for (int i = 0; i < 16; ++i) {
        const bool is_number = n.v[i] == n.v[i];
        const int32_t whole = is_number ? static_cast<int32_t>(n.v[i]) : 0;
        const int32_t half = whole >> 1;
        r.v[i] = a.v[i] * power_of_two(half) * power_of_two(whole - half);
    }
    return r;
}

QWEN3VL_INLINE float reduce_add(Lanes a) {
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            a.v[i] += a.v[i + width];
        }
    }
    return a.v[0];
}

QWEN3VL_INLINE Lanes reduce_add_16(const Lanes* a) {
    float sums[16];
    for (int i = 0; i < 16; ++i) {
        sums[i] = reduce_add(a[i]);
    }
    return load(sums);
}

QWEN3VL_INLINE float reduce_max(Lanes a) {
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            const float x = a.v[i], y = a.v[i + width];
            a.v[i] = x > y || x != x ? x : y;
        }
    }
    return a.v[0];
}

QWEN3VL_INLINE void transpose(Lanes* a) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < i; ++j) {
            const float kept = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = kept;
        }
    }
}

QWEN3VL_INLINE float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    uint32_t bits = (magnitude << 13) + (112u << 23);
    if (magnitude >= 0x7c00) {
        bits += 112u << 23;
        bits |= magnitude > 0x7c00 ? 1u << 22 : 0;
    }
    float r;
    if (magnitude < 0x0400) {
        r = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        __builtin_memcpy(&bits, &r, sizeof bits);
    }
    bits |= sign;
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
}

QWEN3VL_INLINE uint16_t to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
    }
    if (magnitude >= 0x477fe000) {
        return static_cast<uint16_t>(sign | 0x7bff);
    }
    if (magnitude < 0x38800000) {
        const float shifted = __builtin_fabsf(x) + 0.5f;  // one ulp of 0.5 is the step of subnormals, 2^-24
        uint32_t shifted_bits;
        __builtin_memcpy(&shifted_bits, &shifted, sizeof shifted_bits);
        return static_cast<uint16_t>(sign | (shifted_bits - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23);
    return static_cast<uint16_t>(sign | (rounded >> 13));
}

QWEN3VL_INLINE Lanes load_float16(const uint16_t* p) {
    uint16_t halves[16];  // p may be any address
    __builtin_memcpy(halves, p, sizeof halves);
    QWEN3VL_EACH(from_half(halves[i]));
}

QWEN3VL_INLINE void store_float16(uint16_t* p, Lanes a) {
    for (int i = 0; i < 16; ++i) {
        p[i] = to_half(a.v[i]);
    }
}

QWEN3VL_INLINE Lanes load_bfloat16(const uint16_t* p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        __builtin_memcpy(&r.v[i], &bits, sizeof bits);
    }
    return r;
}

QWEN3VL_INLINE Lanes load_int8(const int8_t* p) { QWEN3VL_EACH(static_cast<float>(p[i])); }

QWEN3VL_INLINE Lanes load_uint8(const uint8_t* p) { QWEN3VL_EACH(static_cast<float>(p[i])); }

QWEN3VL_INLINE void store_int8(int8_t* p, Lanes a) {
    const IntLanes codes = to_int(min_number(max_number(a, broadcast(-128.0f)), broadcast(127.0f)));
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<int8_t>(codes.v[i]);
    }
}

QWEN3VL_INLINE Lanes load_int4(const uint8_t* p) {
    QWEN3VL_EACH(static_cast<float>((p[i / 2] >> (i % 2 * 4)) % 16 - 8));
}

QWEN3VL_INLINE void store_int4(uint8_t* p, Lanes a) {
    const IntLanes codes = to_int(min_number(max_number(a, broadcast(-8.0f)), broadcast(7.0f)));
    for (int i = 0; i < 8; ++i) {
        p[i] = static_cast<uint8_t>((codes.v[2 * i] + 8) | (codes.v[2 * i + 1] + 8) << 4);
    }
}

#undef QWEN3VL_EACH
