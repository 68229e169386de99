// The sparse parts of a training step on the CPU: see cpu.py, which builds and calls this.
//
// A C interface on raw pointers: neither Python's nor PyTorch's headers are needed. All matrices
// are float32, contiguous, a row a token or a latent. Loops are plain C++ that compilers vectorise.
// Work is shared out in pieces whose results do not depend on which thread takes them, and partial
// sums are added in a fixed order: the same input gives the same bits.

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using Size = int64_t;
using Key = int32_t;

constexpr Size kRowsAtOnce = 4;        // rows that share one pass over an accumulator
constexpr Size kLine = 16;             // floats in a cache line
constexpr Size kStrip = 32;            // columns that are summed at once
constexpr Size kBlockFloats = 1 << 20;  // of inputs that are scored at once: stay near the cache
constexpr Size kFewestGroups = 512;    // of latents, by whose maxima a row is searched
constexpr Size kRowsScreened = 8;      // that share what is read of the latents
constexpr float kCaution = 0.97f;       // by which rows are expected to fall below those before
constexpr float kTurning = 0x1p-19f;   // covers the rounding of a Hadamard transform
constexpr float kRoundedNorm = 1.001f; // covers the rounding of a norm that is summed in float32

// Several floats that are computed with at once; compilers make of it what the CPU has.
constexpr Size kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

typedef int32_t WholeLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <class V> V load(const void* values) {
    V result;
    std::memcpy(&result, values, sizeof result);
    return result;
}
inline Lanes lanes(const float* values) { return load<Lanes>(values); }

// What `load` reads as floats, `Wide` many: one, or Lanes.
inline float as_floats(int32_t value) { return static_cast<float>(value); }
inline Lanes as_floats(WholeLanes values) { return __builtin_convertvector(values, Lanes); }

float* row(float* matrix, Size index, Size width) { return matrix + index * width; }
const float* row(const float* matrix, Size index, Size width) { return matrix + index * width; }

// ---- sums over rows ------------------------------------------------------------------------

// Rows lie anywhere in memory: fetch the beginnings of the next pass's while this one is computed;
// the CPU fetches on from there by itself.
void prefetch(const float* const* rows, Size from, Size count, Size width) {
    for (Size i = from; i < std::min(count, from + kRowsAtOnce); ++i)
        for (Size m = 0; m < std::min(width, 4 * kLine); m += kLine)
            __builtin_prefetch(rows[i] + m);
}

// accumulator += sum of weights[i] rows[i]
void add_rows(float* __restrict accumulator, const float* const* rows, const float* weights,
              Size count, Size width) {
    Size i = 0;
    for (; i + kRowsAtOnce <= count; i += kRowsAtOnce) {
        prefetch(rows, i + kRowsAtOnce, count, width);
        const float *a = rows[i], *b = rows[i + 1], *c = rows[i + 2], *d = rows[i + 3];
        const float wa = weights[i], wb = weights[i + 1], wc = weights[i + 2], wd = weights[i + 3];
#pragma omp simd
        for (Size m = 0; m < width; ++m)
            accumulator[m] += (wa * a[m] + wb * b[m]) + (wc * c[m] + wd * d[m]);
    }
    for (; i < count; ++i) {
        const float* a = rows[i];
        const float w = weights[i];
#pragma omp simd
        for (Size m = 0; m < width; ++m) accumulator[m] += w * a[m];
    }
}

// Four sums over four quarters: they do not wait for one another as the terms of one sum do.
float dot(const float* __restrict a, const float* __restrict b, Size width) {
    const Size quarter = width / 4;
    float p = 0, q = 0, r = 0, s = 0;
#pragma omp simd reduction(+ : p, q, r, s)
    for (Size m = 0; m < quarter; ++m) {
        p += a[m] * b[m];
        q += a[quarter + m] * b[quarter + m];
        r += a[2 * quarter + m] * b[2 * quarter + m];
        s += a[3 * quarter + m] * b[3 * quarter + m];
    }
    for (Size m = 4 * quarter; m < width; ++m) p += a[m] * b[m];
    return (p + q) + (r + s);
}

// products[i] = vector . rows[i]
void dot_rows(const float* __restrict vector, const float* const* rows, float* products, Size count,
              Size width) {
    Size i = 0;
    for (; i + kRowsAtOnce <= count; i += kRowsAtOnce) {
        prefetch(rows, i + kRowsAtOnce, count, width);
        const float *a = rows[i], *b = rows[i + 1], *c = rows[i + 2], *d = rows[i + 3];
        float pa = 0, pb = 0, pc = 0, pd = 0;
#pragma omp simd reduction(+ : pa, pb, pc, pd)
        for (Size m = 0; m < width; ++m) {
            pa += vector[m] * a[m];
            pb += vector[m] * b[m];
            pc += vector[m] * c[m];
            pd += vector[m] * d[m];
        }
        products[i] = pa, products[i + 1] = pb, products[i + 2] = pc, products[i + 3] = pd;
    }
    for (; i < count; ++i) products[i] = dot(vector, rows[i], width);
}

// ---- choosing the k largest ----------------------------------------------------------------

// Whole numbers that order positive floats as the floats are ordered. What is not positive gets at
// most 0: it is no active latent. A NaN counts as the largest, as in torch.topk.
inline Key key(float value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? INT_MAX : bits;
}

// The same for a lower bound: a NaN bounds nothing.
inline Key lower_key(float value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? INT_MIN : bits;
}

inline float as_float(Key key) {
    float value;
    std::memcpy(&value, &key, sizeof value);
    return value;
}

// A threshold >= 1 that at least k and at most k + slack keys reach; with more only if they are
// equal; 1 where fewer than k are positive. By bisection: counting vectorises, partitioning no.
Key threshold(const Key* keys, Size count, Size k, Size slack) {
    Key smallest = INT_MAX, largest = INT_MIN;
#pragma omp simd reduction(min : smallest) reduction(max : largest)
    for (Size i = 0; i < count; ++i) {
        smallest = std::min(smallest, keys[i]);
        largest = std::max(largest, keys[i]);
    }
    int64_t low = std::max<int64_t>(smallest, 1), high = int64_t{largest} + 1;
    while (high - low > 1) {
        const Key middle = static_cast<Key>(low + (high - low) / 2);
        int32_t reached = 0;
#pragma omp simd reduction(+ : reached)
        for (Size i = 0; i < count; ++i) reached += keys[i] >= middle;
        if (reached < k) {
            high = middle;
        } else {
            low = middle;
            if (reached <= k + slack) break;
        }
    }
    return static_cast<Key>(low);
}

// What one thread needs to search a row of d_sae latents.
struct Search {
    Size groups, found = 0;
    float least = 0;
    std::vector<Key> keys;
    std::vector<int32_t> latents;
    std::vector<float> group_scores, scores;

    // Latent j belongs to group j % groups: a group's maximum is then a maximum of whole vectors.
    Search(Size d_sae, Size k)
        : groups(std::min(d_sae, std::max(kFewestGroups, (8 * k + kLanes - 1) & -kLanes))),
          keys(d_sae + 1), latents(d_sae + 1), group_scores(groups), scores(d_sae + 1) {}
};

// The k best of `count` candidates, into a token's places; zeros fill what is left.
void choose(std::vector<Key>& keys, const float* scores, const int32_t* latents, Size count,
            Size k, float* values, int32_t* indices) {
    for (Size c = 0; c < count; ++c) keys[c] = key(scores[c]);
    const Key least = threshold(keys.data(), count, k, 0);
    Size chosen = 0;
    for (const bool tied : {false, true}) {
        for (Size c = 0; c < count && chosen < k; ++c) {
            if (tied ? keys[c] == least : keys[c] > least) {
                values[chosen] = scores[c];
                indices[chosen++] = latents[c];
            }
        }
    }
    std::fill(values + chosen, values + k, 0.0f);
    std::fill(indices + chosen, indices + k, 0);
}

void select_row(Search& search, const float* pre_activations, Size d_sae, Size k, float* values,
                int32_t* indices) {
    const Size groups = search.groups;
    Key* __restrict best = search.keys.data();
    std::fill(best, best + groups, INT_MIN);
    for (Size start = 0; start < d_sae; start += groups) {
        const Size members = std::min(groups, d_sae - start);
        for (Size g = 0; g < members; ++g)
            best[g] = std::max(best[g], key(pre_activations[start + g]));
    }
    // At least k groups, hence k latents, reach this: no smaller latent is among the k largest.
    const Key least = threshold(best, groups, k, k / 8);
    Size count = 0;
    for (Size g = 0; g < groups; ++g) {
        if (best[g] < least) continue;
        for (Size j = g; j < d_sae; j += groups) {
            search.scores[count] = pre_activations[j];
            search.latents[count] = static_cast<int32_t>(j);
            count += key(pre_activations[j]) >= least;
        }
    }
    choose(search.keys, search.scores.data(), search.latents.data(), count, k, values, indices);
}

// ---- screening -----------------------------------------------------------------------------

// Rows are turned before they are rounded to 8 bits: each block of columns, of a width that is a
// power of two, by random signs and a Hadamard transform. Dot products stay what they are, and
// outlying columns, which would take all of 8 bits, are spread over the block (QuIP#,
// arXiv 2402.04396, section 3).

// A fixed sign for each column, as good as random (a step of splitmix64).
inline float sign(Size column) {
    uint64_t z = static_cast<uint64_t>(column + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z >> 63) != 0 ? -1.0f : 1.0f;
}

// A stage of the transform within kLanes values: sums in the lanes without the bit `half`,
// differences in those with it.
template <int half> Lanes butterfly(Lanes values) {
    WholeLanes partners;
    Lanes signs;
    for (int lane = 0; lane < kLanes; ++lane) {
        partners[lane] = lane ^ half;
        signs[lane] = (lane & half) != 0 ? -1.0f : 1.0f;
    }
#ifdef __clang__
    Lanes swapped;
    for (int lane = 0; lane < kLanes; ++lane) swapped[lane] = values[lane ^ half];
#else
    const Lanes swapped = __builtin_shuffle(values, partners);
#endif
    return swapped + signs * values;
}

// In place, without the factor 1 / sqrt(width).
void hadamard(float* values, Size width) {
    Size half = 1;
    if (width >= kLanes) {
        for (Size i = 0; i < width; i += kLanes) {
            const Lanes pairs = butterfly<2>(butterfly<1>(lanes(values + i)));
            const Lanes all = butterfly<8>(butterfly<4>(pairs));
            std::memcpy(values + i, &all, sizeof all);
        }
        half = kLanes;
    }
    for (; half < width; half *= 2) {
        for (Size start = 0; start < width; start += 2 * half) {
            float* __restrict a = values + start;
            float* __restrict b = a + half;
            for (Size i = 0; i < half; ++i) {
                const float sum = a[i] + b[i];
                b[i] = a[i] - b[i];
                a[i] = sum;
            }
        }
    }
}

// How far a latent's score on a token, as the 8-bit product gives it, may lie from the true one.
// Writing x', w' for the rounded vectors and |x - x'| for the norm of what rounding changed:
//   |x'.w' - x.w| <= |x - x'| |w| + |x'| |w - w'|            (Cauchy-Schwarz),
//   |x'| <= |x| + |x - x'|,
//   the product is a sum of whole numbers, without error; scaling it, and the float32 sum that
//   scores are compared by in the end, err by a few roundings of |x| |w|. Adding the bias errs by a
//   rounding of these and of the bias: of the latter, `lowest` and `highest` have their share.
struct Bound {
    float scale, per_norm, per_error;

    Bound() = default;
    Bound(float scale, float norm, float error, Size d_model) : scale(scale) {
        const float roundings = (2.0f * static_cast<float>(d_model) + 16) * 0x1p-24f;
        per_norm = kRoundedNorm * (error + roundings * (norm + error));
        per_error = kRoundedNorm * (1 + roundings) * (norm + error);
    }
};

// One row of an 8-bit product, with what its bounds need of each latent.
struct Screened {
    const int32_t* products;
    const float *lowest, *highest; // biases, with room for rounding
    const float *scales, *norms, *errors;
    Bound bound;

    // The least score that a latent can have (`side` -1), the largest (1), or the likely one (0); a
    // NaN where it cannot be told. V: float, for latent j, or Lanes, for it and those after it.
    template <int side, class V> V limit(Size j) const {
        using Whole = std::conditional_t<std::is_same_v<V, float>, int32_t, WholeLanes>;
        const V product = bound.scale * load<V>(scales + j) * as_floats(load<Whole>(products + j));
        const V error = bound.per_norm * load<V>(norms + j) + bound.per_error * load<V>(errors + j);
        return (product + load<V>((side < 0 ? lowest : highest) + j)) + side * error;
    }
};

// Calls f<V>(j) for all latents from `begin` to `end`, kLanes at a time while there are so many.
template <class F>
__attribute__((always_inline)) inline void for_lanes(Size begin, Size end, const F f) {
    Size j = begin;
    for (; j + kLanes <= end; j += kLanes) f(j, Lanes{});
    for (; j < end; ++j) f(j, float{});
}

inline uint32_t reached(float value, float least) { return !(value < least); }
inline uint32_t reached(Lanes values, float least) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask(values, _mm512_set1_ps(least), _CMP_NLT_UQ);
#else
    const WholeLanes below = values < least;
    uint32_t bits = 0;
#pragma omp simd reduction(| : bits)
    for (int lane = 0; lane < kLanes; ++lane) bits |= (below[lane] == 0) << lane;
    return bits;
#endif
}

// Brings k of the latents found, those with the largest likely scores, to the front.
void put_likely_first(Search& search, const Screened& screened, Size k) {
    if (search.found <= k) return;
    for (Size c = 0; c < search.found; ++c)
        search.keys[c] = key(screened.limit<0, float>(search.latents[c]));
    const Key least = threshold(search.keys.data(), search.found, k, 0);
    Size first = 0;
    for (Size c = 0; c < search.found && first < k; ++c)
        if (search.keys[c] >= least) std::swap(search.latents[first++], search.latents[c]);
}

// What a row's k largest have to reach at least: that of none is above what at least k latents
// surely reach. By the maxima of groups of latents.
void find_least(Search* searches, const Screened* screened, Size rows, Size d_sae, Size k) {
    const Size groups = searches[0].groups;
    for (Size r = 0; r < rows; ++r)
        std::fill(searches[r].group_scores.begin(), searches[r].group_scores.end(), 0.0f);
    for (Size start = 0; start < d_sae; start += groups) {
        for (Size r = 0; r < rows; ++r) {
            const Screened row = screened[r];
            float* best = searches[r].group_scores.data();
            for_lanes(0, std::min(groups, d_sae - start), [=](Size g, auto width) {
                using V = decltype(width);
                const V old = load<V>(best + g), lower = row.limit<-1, V>(start + g);
                const V larger = lower > old ? lower : old;
                std::memcpy(best + g, &larger, sizeof larger);
            });
        }
    }
    for (Size r = 0; r < rows; ++r) {
        Search& search = searches[r];
        for (Size g = 0; g < groups; ++g) search.keys[g] = key(search.group_scores[g]);
        search.least = as_float(threshold(search.keys.data(), groups, k, k / 8));
    }
}

// The latents of each row that can reach its search.least, ascending.
void find_reaching(Search* searches, const Screened* screened, Size rows, Size d_sae) {
    const Size tile = searches[0].groups;
    for (Size r = 0; r < rows; ++r) searches[r].found = 0;
    for (Size start = 0; start < d_sae; start += tile) {
        for (Size r = 0; r < rows; ++r) {
            const Screened row = screened[r];
            const float least = searches[r].least;
            int32_t* const first = searches[r].latents.data();
            int32_t* next = first + searches[r].found;
            for_lanes(start, std::min(start + tile, d_sae), [=, &next](Size j, auto width) {
                using V = decltype(width);
                for (uint32_t bits = reached(row.limit<1, V>(j), least); bits != 0;
                     bits &= bits - 1)
                    *next++ = static_cast<int32_t>(j + __builtin_ctz(bits));
            });
            searches[r].found = next - first;
        }
    }
}

// Leaves of the latents found those that can reach what k of them surely reach, and makes that the
// row's `least`. Returns whether k reach the old one: else more latents might be among the k largest
// than were found.
bool narrow(Search& search, const Screened& row, Size k) {
    Size sure = 0;
    for (Size c = 0; c < search.found; ++c) {
        search.keys[c] = lower_key(row.limit<-1, float>(search.latents[c]));
        sure += search.keys[c] >= key(search.least);
    }
    if (sure < k) return false;
    // The k-th largest itself: what lies below it, down to the next, would depend on what was found.
    const Key reaching = threshold(search.keys.data(), search.found, k, 0);
    Key least = INT_MAX;
    for (Size c = 0; c < search.found; ++c)
        if (search.keys[c] >= reaching) least = std::min(least, search.keys[c]);
    search.least = as_float(reaching > 1 ? least : reaching);
    Size candidates = 0;
    for (Size c = 0; c < search.found; ++c) {
        const int32_t latent = search.latents[c];
        search.latents[candidates] = latent;
        candidates += reached(row.limit<1, float>(latent), search.least);
    }
    search.found = candidates;
    return true;
}

// The latents of each row that may be among its k largest, into its search.latents, the k likeliest
// first. Rows are done together, some hundred latents at a time, whose norms and biases then stay in
// the cache. `guess` is what a row's k largest are expected to reach, for a token of norm 1, by the
// rows before: where k latents surely reach that, one pass over the row is enough. What is found
// does not depend on it.
void screen_rows(Search* searches, const Screened* screened, Size rows, Size d_sae, Size k,
                 float& guess) {
    for (Size r = 0; r < rows; ++r) searches[r].least = guess * screened[r].bound.per_error;
    if (guess > 0) find_reaching(searches, screened, rows, d_sae);
    float lowest = FLT_MAX;
    for (Size r = 0; r < rows; ++r) {
        Search& search = searches[r];
        const Screened& row = screened[r];
        if (guess == 0 || !narrow(search, row, k)) {
            find_least(&search, &row, 1, d_sae, k);
            find_reaching(&search, &row, 1, d_sae);
            if (!narrow(search, row, k)) search.least = 0; // fewer than k are positive
        }
        lowest = std::min(lowest, search.least / row.bound.per_error);
        put_likely_first(search, row, k);
    }
    guess = lowest < FLT_MAX ? kCaution * lowest : 0;
}

// The candidates of a block of tokens, scored latent by latent: each row of W_enc is then read once
// for all tokens of the block, whose inputs stay in the cache.
struct Rescoring {
    std::vector<int32_t> places; // of the candidates in [token, most], sorted by latent
    std::vector<Size> offsets;   // in `places`, of each latent's candidates
    std::vector<const float*> rows;
    std::vector<float> dots, scores;

    Rescoring(Size d_sae, Size tokens, Size most)
        : offsets(d_sae + 1), rows(tokens + kRowsAtOnce), dots(tokens + kRowsAtOnce),
          scores(tokens * most) {}

    // Into scores[token, most]: of the candidates from begins[t] to ends[t] of each row t.
    void score(const int32_t* candidates, const int32_t* begins, const int32_t* ends, Size tokens,
               Size most, const float* inputs, const float* W_enc, const float* b_enc,
               Size d_model) {
        sort_by_latent(candidates, begins, ends, tokens, most);
        for (Size j = 0; j + 1 < static_cast<Size>(offsets.size()); ++j) {
            const Size begin = j == 0 ? 0 : offsets[j - 1], count = offsets[j] - begin;
            if (count == 0) continue;
            for (Size e = 0; e < count; ++e)
                rows[e] = row(inputs, places[begin + e] / most, d_model);
            // Full passes only, so that a score does not depend on what else is scored with it.
            const Size full = (count + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
            std::fill(rows.begin() + count, rows.begin() + full, rows[count - 1]);
            dot_rows(row(W_enc, j, d_model), rows.data(), dots.data(), full, d_model);
            for (Size e = 0; e < count; ++e) scores[places[begin + e]] = dots[e] + b_enc[j];
        }
    }

private:
    // A counting sort; it leaves in offsets[j] where latent j ends.
    void sort_by_latent(const int32_t* candidates, const int32_t* begins, const int32_t* ends,
                        Size tokens, Size most) {
        std::fill(offsets.begin(), offsets.end(), 0);
        for (Size t = 0; t < tokens; ++t)
            for (Size c = begins[t]; c < ends[t]; ++c) ++offsets[candidates[t * most + c] + 1];
        for (size_t j = 1; j < offsets.size(); ++j) offsets[j] += offsets[j - 1];
        places.resize(offsets.back());
        for (Size t = 0; t < tokens; ++t)
            for (Size c = begins[t]; c < ends[t]; ++c)
                places[offsets[candidates[t * most + c]]++] = static_cast<int32_t>(t * most + c);
    }
};

// ---- sums over the transposed pattern --------------------------------------------------------

// Latents in ranges of about equally many entries: where range `range` of `ranges` begins.
Size first_latent(const Size* offsets, Size d_sae, Size range, Size ranges) {
    if (range == 0) return 0;
    if (range == ranges) return d_sae;
    const Size entry = offsets[d_sae] * range / ranges;
    return std::lower_bound(offsets, offsets + d_sae, entry) - offsets;
}

// sum = sum of weights[e] rows[tokens[e]], rows of kStrip columns. Two sums, of even and of odd
// entries: the terms of one would wait for one another.
void sum_strip(const float* rows, const int32_t* tokens, const float* weights, Size count,
               float* sum) {
    static_assert(kStrip == 2 * kLanes);
    Lanes even[2] = {}, odd[2] = {};
    Size e = 0;
    for (; e + 2 <= count; e += 2) {
        const float *a = row(rows, tokens[e], kStrip), *b = row(rows, tokens[e + 1], kStrip);
        even[0] += weights[e] * lanes(a);
        even[1] += weights[e] * lanes(a + kLanes);
        odd[0] += weights[e + 1] * lanes(b);
        odd[1] += weights[e + 1] * lanes(b + kLanes);
    }
    if (e < count) {
        const float* a = row(rows, tokens[e], kStrip);
        even[0] += weights[e] * lanes(a);
        even[1] += weights[e] * lanes(a + kLanes);
    }
    for (Size half = 0; half < 2; ++half) {
        const Lanes total = even[half] + odd[half];
        std::memcpy(sum + half * kLanes, &total, sizeof total);
    }
}

} // namespace

extern "C" {

// Each row turned and rounded to scales[r] times whole numbers of 8 bits; its norm, and the norm of
// what the rounding changed; neither norm too small, whatever squares are too small for a float.
void groupsae_round_rows(Size threads, const float* rows, Size count, Size width, int8_t* rounded,
                         float* scales, float* norms, float* errors) {
    const Size block = width & -width; // the largest power of two that divides it
    std::vector<float> signs(width);
    for (Size m = 0; m < width; ++m)
        signs[m] = sign(m) / std::sqrt(static_cast<float>(block));
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        std::vector<float> turned(width);
#pragma omp for schedule(static)
        for (Size r = 0; r < count; ++r) {
            const float* source = row(rows, r, width);
            int8_t* __restrict target = rounded + r * width;
            float squares = 0, largest = 0, error_squares = 0;
#pragma omp simd reduction(+ : squares)
            for (Size m = 0; m < width; ++m) {
                squares += source[m] * source[m];
                turned[m] = signs[m] * source[m];
            }
            for (Size start = 0; start < width; start += block)
                hadamard(turned.data() + start, block);
#pragma omp simd reduction(max : largest)
            for (Size m = 0; m < width; ++m) {
                const float size = std::fabs(turned[m]);
                largest = size > largest ? size : largest;
            }
            const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
#pragma omp simd reduction(+ : error_squares)
            for (Size m = 0; m < width; ++m) {
                const float whole = std::nearbyint(turned[m] * inverse);
                target[m] = static_cast<int8_t>(whole);
                const float error = turned[m] - scale * whole;
                error_squares += error * error;
            }
            const float lost = static_cast<float>(width) * FLT_MIN;
            scales[r] = scale;
            norms[r] = std::sqrt(squares + lost);
            errors[r] = std::sqrt(error_squares + lost) + kTurning * norms[r];
        }
    }
}

// TopK(relu(pre_activations)) of each token: values and indices [token, k].
void groupsae_select(Size threads, const float* pre_activations, Size tokens, Size d_sae, Size k,
                     float* values, int32_t* indices) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Search search(d_sae, k);
#pragma omp for schedule(static)
        for (Size t = 0; t < tokens; ++t)
            select_row(search, row(pre_activations, t, d_sae), d_sae, k, row(values, t, k),
                       indices + t * k);
    }
}

// Of each token every pre-activation above its latent's floor: counts[t] of them, in the latents'
// order, into row t of `values` and `indices` [token, most]. Where there are more than `most`, the
// first are given and counts[t] is their number all the same. `floors` has a row for each member
// layer, members[t] says which is the token's; all tokens share the first where it is null.
void groupsae_select_above(Size threads, const float* pre_activations, Size tokens, Size d_sae,
                           const float* floors, const Size* members, Size most, float* values,
                           int32_t* indices, int32_t* counts) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (Size t = 0; t < tokens; ++t) {
        const float* scores = row(pre_activations, t, d_sae);
        const float* floor = row(floors, members == nullptr ? 0 : members[t], d_sae);
        float* found = row(values, t, most);
        int32_t* latents = indices + t * most;
        Size count = 0;
        for (Size start = 0; start < d_sae; start += kLanes) {
            const Size end = std::min(start + kLanes, d_sae);
            bool any = false;
            for (Size j = start; j < end; ++j) any |= scores[j] > floor[j];
            if (!any) continue;
            for (Size j = start; j < end; ++j) {
                if (!(scores[j] > floor[j])) continue;
                if (count < most) {
                    found[count] = scores[j];
                    latents[count] = static_cast<int32_t>(j);
                }
                ++count;
            }
        }
        counts[t] = static_cast<int32_t>(count);
    }
}

// From 8-bit products [token, d_sae] every latent that may be among a token's k largest, by the
// error bound of its score: counts[t] of them, into row t of `candidates` [token, most], the k
// likeliest first; and the largest score each can have, into `limits`. Where there are more than
// `most`, their number is `most` + 1, and none is given. `lowest` and `highest` are the biases.
void groupsae_screen(Size threads, const int32_t* products, Size tokens, Size d_sae, Size d_model,
                     Size k, const float* input_scales, const float* input_norms,
                     const float* input_errors, const float* lowest, const float* highest,
                     const float* scales, const float* norms, const float* errors, Size most,
                     int32_t* candidates, float* limits, int32_t* counts) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        std::vector<Search> searches(kRowsScreened, Search(d_sae, k));
        std::vector<Screened> screened(kRowsScreened);
        float guess = 0;
#pragma omp for schedule(dynamic, 1)
        for (Size first = 0; first < tokens; first += kRowsScreened) {
            const Size rows = std::min(kRowsScreened, tokens - first);
            for (Size r = 0; r < rows; ++r) {
                const Size t = first + r;
                const Bound bound(input_scales[t], input_norms[t], input_errors[t], d_model);
                screened[r] = {products + t * d_sae, lowest, highest, scales, norms, errors, bound};
            }
            screen_rows(searches.data(), screened.data(), rows, d_sae, k, guess);
            for (Size r = 0; r < rows; ++r) {
                const Search& search = searches[r];
                counts[first + r] = static_cast<int32_t>(std::min(search.found, most + 1));
                if (search.found > most) continue;
                const Size place = (first + r) * most;
                for (Size c = 0; c < search.found; ++c) {
                    candidates[place + c] = search.latents[c];
                    limits[place + c] = screened[r].limit<1, float>(search.latents[c]);
                }
            }
        }
    }
}

// TopK(relu(pre-activations)) of each token among its candidates, as `screen` gave them, scored in
// float32: first the k likeliest, then those that may still reach one of these; which they are is
// written over the candidates. Tokens with more than `most` are left as they are.
void groupsae_rescore(Size threads, int32_t* candidates, const float* limits, const int32_t* counts,
                      Size tokens, Size most, Size d_sae, Size d_model, Size k, const float* inputs,
                      const float* W_enc, const float* b_enc, float* values, int32_t* indices) {
    const Size share = (tokens + threads - 1) / threads;
    const Size block = std::min(share, std::max(kBlockFloats / d_model, kRowsAtOnce));
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Rescoring rescoring(d_sae, block, most);
        std::vector<Key> keys(most + 1);
        std::vector<int32_t> begins(block), ends(block);
#pragma omp for schedule(dynamic, 1)
        for (Size start = 0; start < tokens; start += block) {
            const Size size = std::min(block, tokens - start);
            int32_t* chosen = candidates + start * most;
            const float* block_inputs = row(inputs, start, d_model);
            for (Size t = 0; t < size; ++t) {
                const Size count = counts[start + t];
                begins[t] = 0;
                ends[t] = static_cast<int32_t>(count > most ? 0 : std::min(count, k));
            }
            rescoring.score(chosen, begins.data(), ends.data(), size, most, block_inputs, W_enc,
                            b_enc, d_model);
            for (Size t = 0; t < size; ++t) {
                begins[t] = ends[t];
                if (ends[t] < k) continue;
                const float* scores = rescoring.scores.data() + t * most;
                float least = scores[0];
                for (Size c = 1; c < k; ++c) least = scores[c] < least ? scores[c] : least;
                for (Size c = k; c < counts[start + t]; ++c)
                    if (reached(limits[(start + t) * most + c], least))
                        chosen[t * most + ends[t]++] = chosen[t * most + c];
            }
            rescoring.score(chosen, begins.data(), ends.data(), size, most, block_inputs, W_enc,
                            b_enc, d_model);
            for (Size t = 0; t < size; ++t)
                if (counts[start + t] <= most)
                    choose(keys, rescoring.scores.data() + t * most, chosen + t * most, ends[t], k,
                           row(values, start + t, k), indices + (start + t) * k);
        }
    }
}

// error = sum of the active decoder rows + bias - target, its squares' sum for each token, and
// products[t, i] = error[t] . W_dec[indices[t, i]]: of the first counts[t] entries, or, where
// `counts` is null, of those that are active; else 0. `bias` may be null.
void groupsae_decode(Size threads, const float* values, const int32_t* indices, const float* W_dec,
                     const int32_t* counts, const float* bias, const float* target, Size tokens,
                     Size k, Size d_model, float* error, float* squares, float* products) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        std::vector<const float*> rows(k);
        std::vector<float> weights(k), dots(k);
        std::vector<Size> places(k);
#pragma omp for schedule(static)
        for (Size t = 0; t < tokens; ++t) {
            Size active = 0;
            const Size end = t * k + (counts == nullptr ? k : counts[t]);
            for (Size i = t * k; i < (t + 1) * k; ++i) {
                products[i] = 0;
                if (i >= end || (counts == nullptr && values[i] == 0)) continue;
                rows[active] = row(W_dec, indices[i], d_model);
                weights[active] = values[i];
                places[active++] = i;
            }
            float* __restrict token_error = row(error, t, d_model);
            const float* token_target = row(target, t, d_model);
            if (bias != nullptr)
                for (Size m = 0; m < d_model; ++m) token_error[m] = bias[m] - token_target[m];
            else
                for (Size m = 0; m < d_model; ++m) token_error[m] = -token_target[m];
            add_rows(token_error, rows.data(), weights.data(), active, d_model);
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (Size m = 0; m < d_model; ++m) sum += token_error[m] * token_error[m];
            squares[t] = sum;
            dot_rows(token_error, rows.data(), dots.data(), active, d_model);
            for (Size a = 0; a < active; ++a) products[places[a]] = dots[a];
        }
    }
}

// The pattern of active latents by latent: entries offsets[j] to offsets[j + 1] of `order` are the
// places in [token, k] where latent j is active, in the tokens' order. A counting sort; `offsets`
// has d_sae + 1 places.
void groupsae_transpose(Size threads, const float* values, const int32_t* indices, Size tokens,
                        Size k, Size d_sae, Size* offsets, int32_t* order) {
    const Size entries = tokens * k, block = (entries + threads - 1) / threads;
    std::vector<int32_t> counts(static_cast<size_t>(threads * d_sae), 0);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1)
    for (Size b = 0; b < threads; ++b) {
        int32_t* block_counts = counts.data() + b * d_sae;
        for (Size i = b * block; i < std::min(entries, (b + 1) * block); ++i)
            block_counts[indices[i]] += values[i] != 0;
    }
    Size total = 0;
    for (Size j = 0; j < d_sae; ++j) {
        offsets[j] = total;
        for (Size b = 0; b < threads; ++b) {
            const int32_t count = counts[b * d_sae + j];
            counts[b * d_sae + j] = static_cast<int32_t>(total);
            total += count;
        }
    }
    offsets[d_sae] = total;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1)
    for (Size b = 0; b < threads; ++b) {
        int32_t* next = counts.data() + b * d_sae;
        for (Size i = b * block; i < std::min(entries, (b + 1) * block); ++i)
            if (values[i] != 0) order[next[indices[i]]++] = static_cast<int32_t>(i);
    }
}

// For each latent j the sum over its entries (t, i) of scale weights[t, i] rows[t], and of
// scale weights[t, i] alone into `totals`, unless that is null. They go to place places[j], or j
// where `places` is null, and are added to what is there if `add`.
//
// The columns are done a strip at a time: a strip of all rows stays in a core's cache, a strip of
// a sum in registers. Strips are equal work, however unequally often latents are active.
void groupsae_sum_rows(Size threads, const Size* offsets, const int32_t* order,
                       const float* weights, const float* rows, const Size* places, float scale,
                       Size add, Size tokens, Size k, Size d_sae, Size d_model, float* sums,
                       float* totals) {
    const Size entries = offsets[d_sae], strips = (d_model + kStrip - 1) / kStrip;
    const std::unique_ptr<float[]> stripped(new float[strips * tokens * kStrip]);
    const std::unique_ptr<int32_t[]> entry_tokens(new int32_t[entries]);
    const std::unique_ptr<float[]> entry_weights(new float[entries]);
    const Size ranges = (8 * threads + strips - 1) / strips; // of latents: work for all threads

#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp for schedule(static) nowait
        for (Size t = 0; t < tokens; ++t) {
            for (Size strip = 0; strip < strips; ++strip) {
                const Size start = strip * kStrip, width = std::min(kStrip, d_model - start);
                float* target = row(stripped.get(), strip * tokens + t, kStrip);
                std::copy_n(row(rows, t, d_model) + start, width, target);
                std::fill(target + width, target + kStrip, 0.0f);
            }
        }
#pragma omp for schedule(static)
        for (Size e = 0; e < entries; ++e) {
            entry_tokens[e] = static_cast<int32_t>(order[e] / k);
            entry_weights[e] = scale * weights[order[e]];
        }
#pragma omp for schedule(dynamic, 1)
        for (Size task = 0; task < strips * ranges; ++task) {
            const Size strip = task / ranges, range = task % ranges;
            const float* strip_rows = row(stripped.get(), strip * tokens, kStrip);
            const Size start = strip * kStrip, width = std::min(kStrip, d_model - start);
            for (Size j = first_latent(offsets, d_sae, range, ranges);
                 j < first_latent(offsets, d_sae, range + 1, ranges); ++j) {
                const Size begin = offsets[j], count = offsets[j + 1] - begin;
                const Size place = places == nullptr ? j : places[j];
                float sum[kStrip];
                sum_strip(strip_rows, entry_tokens.get() + begin, entry_weights.get() + begin,
                          count, sum);
                float* target = row(sums, place, d_model) + start;
                if (add)
                    for (Size m = 0; m < width; ++m) target[m] += sum[m];
                else
                    std::copy_n(sum, width, target);
                if (strip > 0 || totals == nullptr) continue;
                float total = 0;
                for (Size e = begin; e < begin + count; ++e) total += entry_weights[e];
                totals[place] = total + (add ? totals[place] : 0);
            }
        }
    }
}

// One step of Adam on each row of `weights`: m and v are the running means of the gradient and of
// its square, which keep `beta1` and `beta2` of what they were and take the rest of what is new;
// `rate` is the learning rate over m's bias correction, `unbias` the root of v's inverse one. The
// gradient is first multiplied by `factor`. With `on_sphere` rows have unit norm: the gradient's
// component along the row is left out, and the row is brought back to unit norm.
void groupsae_adam(Size threads, const float* gradients, Size count, Size width, float factor,
                   float beta1, float rest1, float beta2, float rest2, float rate, float unbias,
                   float epsilon, Size on_sphere, float* weights, float* means, float* squares) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (Size r = 0; r < count; ++r) {
        const float* g = row(gradients, r, width);
        float* __restrict w = row(weights, r, width);
        float* __restrict m = row(means, r, width);
        float* __restrict v = row(squares, r, width);
        const float along = on_sphere ? dot(g, w, width) : 0;
        float norm = 0;
#pragma omp simd reduction(+ : norm)
        for (Size i = 0; i < width; ++i) {
            const float gradient = factor * (g[i] - along * w[i]);
            m[i] = beta1 * m[i] + rest1 * gradient;
            v[i] = beta2 * v[i] + rest2 * gradient * gradient;
            w[i] -= rate * m[i] / (std::sqrt(v[i]) * unbias + epsilon);
            norm += w[i] * w[i];
        }
        if (!on_sphere) continue;
        const float length = std::max(std::sqrt(norm), FLT_MIN);
        for (Size i = 0; i < width; ++i) w[i] /= length;
    }
}

} // extern "C"
