// 16 float lanes in one register of AVX-512F. Included by lanes.h, which documents the functions.

constexpr int kRegisterLanes = 32;

struct Lanes {
    __m512 v;
};
struct IntLanes {
    __m512i v;
};

QWEN3VL_INLINE __mmask16 mask_of(int n) { return static_cast<__mmask16>((1u << n) - 1); }

QWEN3VL_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
QWEN3VL_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
QWEN3VL_INLINE Lanes load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask_of(n), p)}; }
QWEN3VL_INLINE void store_n(float* p, Lanes a, int n) { _mm512_mask_storeu_ps(p, mask_of(n), a.v); }
QWEN3VL_INLINE Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
QWEN3VL_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
QWEN3VL_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
QWEN3VL_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
QWEN3VL_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
QWEN3VL_INLINE Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
QWEN3VL_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QWEN3VL_INLINE Lanes max_number(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
QWEN3VL_INLINE Lanes min_number(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
QWEN3VL_INLINE Lanes sqrt(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }

QWEN3VL_INLINE Lanes max(Lanes a, Lanes b) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), is_nan, a.v)};
}

QWEN3VL_INLINE Lanes abs(Lanes a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}

QWEN3VL_INLINE Lanes first_n(int n, Lanes a, Lanes b) { return {_mm512_mask_mov_ps(b.v, mask_of(n), a.v)}; }

QWEN3VL_INLINE Lanes round_to_even(Lanes a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

QWEN3VL_INLINE IntLanes to_int(Lanes a) { return {_mm512_cvtps_epi32(a.v)}; }
QWEN3VL_INLINE Lanes to_float(IntLanes a) { return {_mm512_cvtepi32_ps(a.v)}; }
QWEN3VL_INLINE IntLanes load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
QWEN3VL_INLINE void store_int(int32_t* p, IntLanes a) { _mm512_storeu_si512(p, a.v); }
QWEN3VL_INLINE Lanes scale_by_power_of_two(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.v, n.v)}; }

QWEN3VL_INLINE __m256 low_half(__m512 a) { return _mm512_castps512_ps256(a); }

QWEN3VL_INLINE __m256 high_half(__m512 a) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
}

QWEN3VL_INLINE float reduce_add(Lanes a) {
    const __m256 of8 = _mm256_add_ps(low_half(a.v), high_half(a.v));
    const __m128 of4 = _mm_add_ps(_mm256_castps256_ps128(of8), _mm256_extractf128_ps(of8, 1));
    const __m128 of2 = _mm_add_ps(of4, _mm_movehl_ps(of4, of4));
    return _mm_cvtss_f32(_mm_add_ss(of2, _mm_shuffle_ps(of2, of2, 1)));
}

QWEN3VL_INLINE __m512 add_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

QWEN3VL_INLINE __m512 add_quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Each sum of two registers holds twice as many of the 16 as they did, in half the lanes; a quarter q of a register ends
// with those of a[4 q] ... a[4 q + 3].
QWEN3VL_INLINE Lanes reduce_add_16(const Lanes* a) {
    __m512 of4[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        of4[i] = add_quarters(add_halves(a[i].v, a[i + 4].v), add_halves(a[i + 8].v, a[i + 12].v));
    }
    const __m512 of2[2] = {
        _mm512_add_ps(_mm512_shuffle_ps(of4[0], of4[1], 0x44), _mm512_shuffle_ps(of4[0], of4[1], 0xee)),
        _mm512_add_ps(_mm512_shuffle_ps(of4[2], of4[3], 0x44), _mm512_shuffle_ps(of4[2], of4[3], 0xee)),
    };
    return {_mm512_add_ps(_mm512_shuffle_ps(of2[0], of2[1], 0x88), _mm512_shuffle_ps(of2[0], of2[1], 0xdd))};
}

QWEN3VL_INLINE float reduce_max(Lanes a) {
    a = max(a, {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)});
    a = max(a, {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)});
    a = max(a, {_mm512_permute_ps(a.v, 0x4e)});
    a = max(a, {_mm512_permute_ps(a.v, 0xb1)});
    return _mm512_cvtss_f32(a.v);
}

// Four blocks of 4 x 4 of each group of four rows, then the blocks themselves.
QWEN3VL_INLINE void transpose(Lanes* a) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512 low01 = _mm512_unpacklo_ps(a[i].v, a[i + 1].v), high01 = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
        const __m512 low23 = _mm512_unpacklo_ps(a[i + 2].v, a[i + 3].v);
        const __m512 high23 = _mm512_unpackhi_ps(a[i + 2].v, a[i + 3].v);
        a[i].v = _mm512_shuffle_ps(low01, low23, 0x44);
        a[i + 1].v = _mm512_shuffle_ps(low01, low23, 0xee);
        a[i + 2].v = _mm512_shuffle_ps(high01, high23, 0x44);
        a[i + 3].v = _mm512_shuffle_ps(high01, high23, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 even01 = _mm512_shuffle_f32x4(a[i].v, a[i + 4].v, 0x88);
        const __m512 odd01 = _mm512_shuffle_f32x4(a[i].v, a[i + 4].v, 0xdd);
        const __m512 even23 = _mm512_shuffle_f32x4(a[i + 8].v, a[i + 12].v, 0x88);
        const __m512 odd23 = _mm512_shuffle_f32x4(a[i + 8].v, a[i + 12].v, 0xdd);
        a[i].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
        a[i + 4].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        a[i + 8].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
        a[i + 12].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}

QWEN3VL_INLINE Lanes load_float16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

QWEN3VL_INLINE void store_float16(uint16_t* p, Lanes a) {
    // The constants come first: where the lane is NaN, the second operand is the result.
    a = max_number(broadcast(-65504.0f), min_number(broadcast(65504.0f), a));
    const __m256i halves = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}

QWEN3VL_INLINE Lanes load_bfloat16(const uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

QWEN3VL_INLINE Lanes load_int8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

QWEN3VL_INLINE Lanes load_uint8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

QWEN3VL_INLINE void store_int8(int8_t* p, Lanes a) {
    a = min_number(max_number(a, broadcast(-128.0f)), broadcast(127.0f));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

QWEN3VL_INLINE Lanes load_int4(const uint8_t* p) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i low = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(codes, _mm_set1_epi8(8))))};
}

QWEN3VL_INLINE void store_int4(uint8_t* p, Lanes a) {
    a = min_number(max_number(a, broadcast(-8.0f)), broadcast(7.0f));
    const __m128i codes = _mm_add_epi8(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)), _mm_set1_epi8(8));
    const __m128i even = _mm_and_si128(codes, _mm_set1_epi16(15));
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(codes, 4), _mm_set1_epi16(0xf0));
    const __m128i pairs = _mm_or_si128(even, odd);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}
