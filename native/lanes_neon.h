// 16 float lanes in four registers of 64-bit ARM. Included by lanes.h, which documents the functions.

constexpr int kRegisterLanes = 8;

struct Lanes {
    float32x4_t v[4];
};
struct IntLanes {
    int32x4_t v[4];
};

#define QWEN3VL_EACH(expression)      \
    Lanes r;                          \
    for (int i = 0; i < 4; ++i) {     \
        r.v[i] = (expression);        \
    }                                 \
    return r

// Lane i of the four from 4 * part on is set where i < n.
QWEN3VL_INLINE uint32x4_t mask_of(int n, int part) {
    const int32x4_t index = {0, 1, 2, 3};
    return vcltq_s32(index, vdupq_n_s32(n - 4 * part));
}

QWEN3VL_INLINE Lanes load(const float* p) { QWEN3VL_EACH(vld1q_f32(p + 4 * i)); }

QWEN3VL_INLINE void store(float* p, Lanes a) {
    for (int i = 0; i < 4; ++i) {
        vst1q_f32(p + 4 * i, a.v[i]);
    }
}

QWEN3VL_INLINE Lanes load_n(const float* p, int n) {
    float all[16] = {};
    for (int i = 0; i < n; ++i) {
        all[i] = p[i];
    }
    return load(all);
}

QWEN3VL_INLINE void store_n(float* p, Lanes a, int n) {
    float all[16];
    store(all, a);
    for (int i = 0; i < n; ++i) {
        p[i] = all[i];
    }
}

QWEN3VL_INLINE Lanes broadcast(float x) { QWEN3VL_EACH(vdupq_n_f32(x)); }
QWEN3VL_INLINE Lanes zero() { return broadcast(0.0f); }
QWEN3VL_INLINE Lanes add(Lanes a, Lanes b) { QWEN3VL_EACH(vaddq_f32(a.v[i], b.v[i])); }
QWEN3VL_INLINE Lanes sub(Lanes a, Lanes b) { QWEN3VL_EACH(vsubq_f32(a.v[i], b.v[i])); }
QWEN3VL_INLINE Lanes mul(Lanes a, Lanes b) { QWEN3VL_EACH(vmulq_f32(a.v[i], b.v[i])); }
QWEN3VL_INLINE Lanes div(Lanes a, Lanes b) { QWEN3VL_EACH(vdivq_f32(a.v[i], b.v[i])); }
QWEN3VL_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { QWEN3VL_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
QWEN3VL_INLINE Lanes sqrt(Lanes a) { QWEN3VL_EACH(vsqrtq_f32(a.v[i])); }
QWEN3VL_INLINE Lanes abs(Lanes a) { QWEN3VL_EACH(vabsq_f32(a.v[i])); }

// By comparison and choice: the instructions for a maximum treat NaN and the two zeros in ways of their own.
QWEN3VL_INLINE Lanes max_number(Lanes a, Lanes b) {
    QWEN3VL_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}

QWEN3VL_INLINE Lanes min_number(Lanes a, Lanes b) {
    QWEN3VL_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}

QWEN3VL_INLINE Lanes max(Lanes a, Lanes b) {
    const Lanes larger = max_number(a, b);
    QWEN3VL_EACH(vbslq_f32(vceqq_f32(a.v[i], a.v[i]), larger.v[i], a.v[i]));
}

QWEN3VL_INLINE Lanes first_n(int n, Lanes a, Lanes b) { QWEN3VL_EACH(vbslq_f32(mask_of(n, i), a.v[i], b.v[i])); }

QWEN3VL_INLINE Lanes round_to_even(Lanes a) { QWEN3VL_EACH(vrndnq_f32(a.v[i])); }

QWEN3VL_INLINE IntLanes to_int(Lanes a) {
    IntLanes r;
    for (int i = 0; i < 4; ++i) {
        r.v[i] = vcvtnq_s32_f32(a.v[i]);
    }
    return r;
}

QWEN3VL_INLINE Lanes to_float(IntLanes a) { QWEN3VL_EACH(vcvtq_f32_s32(a.v[i])); }

QWEN3VL_INLINE IntLanes load_int(const int32_t* p) {
    IntLanes r;
    for (int i = 0; i < 4; ++i) {
        r.v[i] = vld1q_s32(p + 4 * i);
    }
    return r;
}

QWEN3VL_INLINE void store_int(int32_t* p, IntLanes a) {
    for (int i = 0; i < 4; ++i) {
        vst1q_s32(p + 4 * i, a.v[i]);
    }
}

// The factor is two powers: the first keeps the product normal, the second rounds it where it leaves the range.
QWEN3VL_INLINE Lanes scale_by_power_of_two(Lanes a, Lanes n) {
    Lanes r;
    for (int i = 0; i < 4; ++i) {
        const int32x4_t whole = vcvtnq_s32_f32(n.v[i]);
        const int32x4_t half = vshrq_n_s32(whole, 1);
        const int32x4_t bias = vdupq_n_s32(127);
        const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
        const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
        r.v[i] = vmulq_f32(vmulq_f32(a.v[i], vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
    }
    return r;
}

QWEN3VL_INLINE float reduce_add(Lanes a) {
    const float32x4_t of4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t of2 = vadd_f32(vget_low_f32(of4), vget_high_f32(of4));
    return vget_lane_f32(of2, 0) + vget_lane_f32(of2, 1);
}

QWEN3VL_INLINE Lanes reduce_add_16(const Lanes* a) {
    float sums[16];
    for (int i = 0; i < 16; ++i) {
        sums[i] = reduce_add(a[i]);
    }
    return load(sums);
}

QWEN3VL_INLINE float reduce_max(Lanes a) {
    const Lanes of8 = max(a, {{a.v[2], a.v[3], a.v[0], a.v[1]}});
    const Lanes of4 = max(of8, {{of8.v[1], of8.v[0], of8.v[3], of8.v[2]}});
    float all[16];
    store(all, of4);
    for (int width = 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            const float x = all[i], y = all[i + width];
            all[i] = x > y || x != x ? x : y;
        }
    }
    return all[0];
}

QWEN3VL_INLINE float32x4_t rows_of_two(float32x4_t a, float32x4_t b, bool is_high) {
    const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
    return vreinterpretq_f32_f64(is_high ? vtrn2q_f64(x, y) : vtrn1q_f64(x, y));
}

// Each block of 4 x 4, written to its mirror image.
QWEN3VL_INLINE void transpose(Lanes* a) {
    Lanes from[16];
    for (int i = 0; i < 16; ++i) {
        from[i] = a[i];
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 4; ++j) {
            const float32x4_t even01 = vtrn1q_f32(from[i].v[j], from[i + 1].v[j]);
            const float32x4_t odd01 = vtrn2q_f32(from[i].v[j], from[i + 1].v[j]);
            const float32x4_t even23 = vtrn1q_f32(from[i + 2].v[j], from[i + 3].v[j]);
            const float32x4_t odd23 = vtrn2q_f32(from[i + 2].v[j], from[i + 3].v[j]);
            a[4 * j].v[i / 4] = rows_of_two(even01, even23, false);
            a[4 * j + 1].v[i / 4] = rows_of_two(odd01, odd23, false);
            a[4 * j + 2].v[i / 4] = rows_of_two(even01, even23, true);
            a[4 * j + 3].v[i / 4] = rows_of_two(odd01, odd23, true);
        }
    }
}

QWEN3VL_INLINE Lanes load_float16(const uint16_t* p) {
    QWEN3VL_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}

QWEN3VL_INLINE void store_float16(uint16_t* p, Lanes a) {
    // The constants come first: where the lane is NaN, the second operand is the result.
    a = max_number(broadcast(-65504.0f), min_number(broadcast(65504.0f), a));
    for (int i = 0; i < 4; ++i) {
        vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
    }
}

QWEN3VL_INLINE Lanes load_bfloat16(const uint16_t* p) {
    QWEN3VL_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}

QWEN3VL_INLINE Lanes from_bytes(int8x16_t codes) {
    const int16x8_t first = vmovl_s8(vget_low_s8(codes)), second = vmovl_s8(vget_high_s8(codes));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(first))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(first))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(second))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(second)))}};
}

QWEN3VL_INLINE Lanes load_int8(const int8_t* p) { return from_bytes(vld1q_s8(p)); }

QWEN3VL_INLINE Lanes load_uint8(const uint8_t* p) {
    const uint8x16_t codes = vld1q_u8(p);
    const uint16x8_t first = vmovl_u8(vget_low_u8(codes)), second = vmovl_u8(vget_high_u8(codes));
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(first))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(first))),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(second))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(second)))}};
}

// Sixteen bytes of lanes that are rounded to even and cut off at the two ends.
QWEN3VL_INLINE int8x16_t to_bytes(Lanes a, float lowest, float highest) {
    const IntLanes codes = to_int(min_number(max_number(a, broadcast(lowest)), broadcast(highest)));
    const int16x8_t first = vcombine_s16(vmovn_s32(codes.v[0]), vmovn_s32(codes.v[1]));
    const int16x8_t second = vcombine_s16(vmovn_s32(codes.v[2]), vmovn_s32(codes.v[3]));
    return vcombine_s8(vmovn_s16(first), vmovn_s16(second));
}

QWEN3VL_INLINE void store_int8(int8_t* p, Lanes a) { vst1q_s8(p, to_bytes(a, -128.0f, 127.0f)); }

QWEN3VL_INLINE Lanes load_int4(const uint8_t* p) {
    const uint8x8_t pairs = vld1_u8(p);
    const uint8x8x2_t codes = vzip_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
    const int8x16_t both = vreinterpretq_s8_u8(vcombine_u8(codes.val[0], codes.val[1]));
    return from_bytes(vsubq_s8(both, vdupq_n_s8(8)));
}

QWEN3VL_INLINE void store_int4(uint8_t* p, Lanes a) {
    const uint8x16_t codes = vreinterpretq_u8_s8(vaddq_s8(to_bytes(a, -8.0f, 7.0f), vdupq_n_s8(8)));
    const uint8x8x2_t halves = vuzp_u8(vget_low_u8(codes), vget_high_u8(codes));
    vst1_u8(p, vorr_u8(halves.val[0], vshl_n_u8(halves.val[1], 4)));
}

#undef QWEN3VL_EACH
