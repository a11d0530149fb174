// 16 float lanes in two registers of AVX2, FMA and F16C. Included by lanes.h, which documents the functions.

constexpr int kRegisterLanes = 8;

struct Lanes {
    __m256 lo, hi;
};
struct IntLanes {
    __m256i lo, hi;
};

// Lane i of the eight from `first` on is set where i < n.
QWEN3VL_INLINE __m256i mask_of(int n, int first) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), index);
}

QWEN3VL_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

QWEN3VL_INLINE void store(float* p, Lanes a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

QWEN3VL_INLINE Lanes load_n(const float* p, int n) {
    return {_mm256_maskload_ps(p, mask_of(n, 0)), _mm256_maskload_ps(p + 8, mask_of(n, 8))};
}

QWEN3VL_INLINE void store_n(float* p, Lanes a, int n) {
    _mm256_maskstore_ps(p, mask_of(n, 0), a.lo);
    _mm256_maskstore_ps(p + 8, mask_of(n, 8), a.hi);
}

QWEN3VL_INLINE Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QWEN3VL_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
QWEN3VL_INLINE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
QWEN3VL_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
QWEN3VL_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
QWEN3VL_INLINE Lanes div(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }

QWEN3VL_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

QWEN3VL_INLINE Lanes max_number(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
QWEN3VL_INLINE Lanes min_number(Lanes a, Lanes b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
QWEN3VL_INLINE Lanes sqrt(Lanes a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }

QWEN3VL_INLINE __m256 max_of_8(__m256 a, __m256 b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

QWEN3VL_INLINE Lanes max(Lanes a, Lanes b) { return {max_of_8(a.lo, b.lo), max_of_8(a.hi, b.hi)}; }

QWEN3VL_INLINE Lanes abs(Lanes a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}

QWEN3VL_INLINE Lanes first_n(int n, Lanes a, Lanes b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(mask_of(n, 0))),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(mask_of(n, 8)))};
}

QWEN3VL_INLINE Lanes round_to_even(Lanes a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

QWEN3VL_INLINE IntLanes to_int(Lanes a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
QWEN3VL_INLINE Lanes to_float(IntLanes a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

QWEN3VL_INLINE IntLanes load_int(const int32_t* p) {
    const __m256i* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}

QWEN3VL_INLINE void store_int(int32_t* p, IntLanes a) {
    __m256i* to = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(to, a.lo);
    _mm256_storeu_si256(to + 1, a.hi);
}

// The factor is two powers: the first keeps the product normal, the second rounds it where it leaves the range.
QWEN3VL_INLINE __m256 scale_8_by_power_of_two(__m256 a, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_and_ps(n, _mm256_cmp_ps(n, n, _CMP_ORD_Q)));
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

QWEN3VL_INLINE Lanes scale_by_power_of_two(Lanes a, Lanes n) {
    return {scale_8_by_power_of_two(a.lo, n.lo), scale_8_by_power_of_two(a.hi, n.hi)};
}

QWEN3VL_INLINE float reduce_add(Lanes a) {
    const __m256 of8 = _mm256_add_ps(a.lo, a.hi);
    const __m128 of4 = _mm_add_ps(_mm256_castps256_ps128(of8), _mm256_extractf128_ps(of8, 1));
    const __m128 of2 = _mm_add_ps(of4, _mm_movehl_ps(of4, of4));
    return _mm_cvtss_f32(_mm_add_ss(of2, _mm_shuffle_ps(of2, of2, 1)));
}

QWEN3VL_INLINE Lanes reduce_add_16(const Lanes* a) {
    float sums[16];
    for (int i = 0; i < 16; ++i) {
        sums[i] = reduce_add(a[i]);
    }
    return load(sums);
}

QWEN3VL_INLINE float reduce_max(Lanes a) {
    __m256 m = max_of_8(a.lo, a.hi);
    m = max_of_8(m, _mm256_permute2f128_ps(m, m, 1));
    m = max_of_8(m, _mm256_permute_ps(m, 0x4e));
    m = max_of_8(m, _mm256_permute_ps(m, 0xb1));
    return _mm256_cvtss_f32(m);
}

// 8 x 8 in place: pairs of rows, groups of four, halves.
QWEN3VL_INLINE void transpose_8(__m256* a) {
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        const __m256 low01 = _mm256_unpacklo_ps(a[i], a[i + 1]), high01 = _mm256_unpackhi_ps(a[i], a[i + 1]);
        const __m256 low23 = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), high23 = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
        a[i] = _mm256_shuffle_ps(low01, low23, 0x44);
        a[i + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
        a[i + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
        a[i + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m256 low = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        a[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
        a[i] = low;
    }
}

QWEN3VL_INLINE void transpose(Lanes* a) {
    __m256 block[8], other[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        block[i] = a[i].lo;
    }
    transpose_8(block);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[i].lo = block[i];
        block[i] = a[i + 8].hi;
    }
    transpose_8(block);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[i + 8].hi = block[i];
        block[i] = a[i].hi;
        other[i] = a[i + 8].lo;
    }
    transpose_8(block);
    transpose_8(other);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[i].hi = other[i];
        a[i + 8].lo = block[i];
    }
}

QWEN3VL_INLINE Lanes load_float16(const uint16_t* p) {
    const __m128i* from = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}

QWEN3VL_INLINE void store_float16(uint16_t* p, Lanes a) {
    // The constants come first: where the lane is NaN, the second operand is the result.
    a = max_number(broadcast(-65504.0f), min_number(broadcast(65504.0f), a));
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m128i* to = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(to, _mm256_cvtps_ph(a.lo, mode));
    _mm_storeu_si128(to + 1, _mm256_cvtps_ph(a.hi, mode));
}

QWEN3VL_INLINE Lanes load_bfloat16(const uint16_t* p) {
    const __m128i* from = reinterpret_cast<const __m128i*>(p);
    const __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16);
    const __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1)), 16);
    return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}

QWEN3VL_INLINE Lanes from_bytes(__m128i codes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes)))};
}

QWEN3VL_INLINE Lanes load_int8(const int8_t* p) {
    return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

QWEN3VL_INLINE Lanes load_uint8(const uint8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(codes, codes)))};
}

// Sixteen bytes of lanes that are rounded to even and cut off at the two ends.
QWEN3VL_INLINE __m128i to_bytes(Lanes a, float lowest, float highest) {
    const IntLanes codes = to_int(min_number(max_number(a, broadcast(lowest)), broadcast(highest)));
    const __m128i first = _mm_packs_epi32(_mm256_castsi256_si128(codes.lo), _mm256_extracti128_si256(codes.lo, 1));
    const __m128i second = _mm_packs_epi32(_mm256_castsi256_si128(codes.hi), _mm256_extracti128_si256(codes.hi, 1));
    return _mm_packs_epi16(first, second);
}

QWEN3VL_INLINE void store_int8(int8_t* p, Lanes a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bytes(a, -128.0f, 127.0f));
}

QWEN3VL_INLINE Lanes load_int4(const uint8_t* p) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i low = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    return from_bytes(_mm_sub_epi8(codes, _mm_set1_epi8(8)));
}

QWEN3VL_INLINE void store_int4(uint8_t* p, Lanes a) {
    const __m128i codes = _mm_add_epi8(to_bytes(a, -8.0f, 7.0f), _mm_set1_epi8(8));
    const __m128i even = _mm_and_si128(codes, _mm_set1_epi16(15));
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(codes, 4), _mm_set1_epi16(0xf0));
    const __m128i pairs = _mm_or_si128(even, odd);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}
