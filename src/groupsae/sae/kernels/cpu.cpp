// The sparse parts of a TopK training step on the CPU: see cpu.py, which builds and calls this.
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
#include <vector>

namespace {

using Size = int64_t;
using Key = int32_t;

constexpr Size kRowsAtOnce = 4;        // rows that share one pass over an accumulator
constexpr Size kLine = 16;             // floats in a cache line
constexpr Size kStrip = 32;            // columns that are summed at once
constexpr Size kFewestTokens = 32;     // in a block whose candidates are scored at once
constexpr Size kMostTokens = 512;      // more would not stay in the cache
constexpr Size kFewestGroups = 512;    // of latents, by whose maxima a row is searched
constexpr float kRoundedNorm = 1.001f; // covers the rounding of a norm that is summed in float32

// Several floats that are computed with at once; compilers make of it what the CPU has.
constexpr Size kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline Lanes lanes(const float* values) {
    Lanes result;
    std::memcpy(&result, values, sizeof result);
    return result;
}

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
    Size groups;
    std::vector<Key> group_keys, group_lower_keys, upper_keys, keys, lower_keys;
    std::vector<int32_t> latents;
    std::vector<float> scores;

    // Latent j belongs to group j % groups: a group's maximum is then a maximum of whole vectors.
    Search(Size d_sae, Size k)
        : groups(std::min(d_sae, std::max(kFewestGroups, 8 * k))), group_keys(groups),
          group_lower_keys(groups), upper_keys(d_sae), keys(d_sae + 1), lower_keys(d_sae + 1),
          latents(d_sae + 1), scores(d_sae + 1) {}
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
    Key* __restrict best = search.group_keys.data();
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

// ---- bfloat16 ------------------------------------------------------------------------------

// To the nearest bfloat16, ties to even; what rounds beyond the largest becomes infinite.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = uint32_t{value} << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// How far a latent's score on a token, as the bfloat16 product gives it, may lie from the true one.
// Writing x', w' for the rounded vectors:
//   |x'.w' - x.w| <= |x - x'| |w| + |x'| |w - w'|            (Cauchy-Schwarz),
//   summing d_model products in float32 errs by at most summation |x'| |w'|,
//   |w'| <= |w| + |w - w'|, and rounding the sum to bfloat16 errs by 1/255 of it.
struct Bound {
    float per_norm, per_error;

    Bound(float norm, float error, Size d_model) {
        const float rounded_norm = norm + error;
        const float summation = 2.0f * static_cast<float>(d_model) * 0x1p-24f;
        per_norm = kRoundedNorm * (error + summation * rounded_norm);
        per_error = kRoundedNorm * (1 + summation) * rounded_norm;
    }

    // The widest error of `product` for a latent of this norm and rounding error; the last term is
    // for the sum with the bias, and the constant for numbers too small to be normal.
    float operator()(float product, float score, float norm, float error) const {
        return per_norm * norm + per_error * error + std::fabs(product) * (1.0f / 254.0f) +
               std::fabs(score) * 0x1p-21f + 1e-30f;
    }
};

// One row of a bfloat16 product, with what its bounds need.
struct Screened {
    const uint16_t* products;
    const float *biases, *norms, *errors;
    Bound bound;

    float score(Size j) const { return from_bfloat16(products[j]) + biases[j]; }
    float error(Size j) const {
        return bound(from_bfloat16(products[j]), score(j), norms[j], errors[j]);
    }
    // The largest score that latent j can have, and the least.
    Key upper(Size j) const { return key(score(j) + error(j)); }
    Key lower(Size j) const { return lower_key(score(j) - error(j)); }
};

// The latents that may be among the k largest, into search.latents; returns their number.
Size screen_row(Search& search, const Screened screened, Size d_sae, Size k) {
    const Size groups = search.groups;
    Key* __restrict best = search.group_keys.data();
    Key* __restrict best_lower = search.group_lower_keys.data();
    Key* __restrict uppers = search.upper_keys.data();
    std::fill(best, best + groups, INT_MIN);
    std::fill(best_lower, best_lower + groups, INT_MIN);
    for (Size start = 0; start < d_sae; start += groups) {
        const Size members = std::min(groups, d_sae - start);
#pragma omp simd
        for (Size g = 0; g < members; ++g) {
            const Key upper = screened.upper(start + g), lower = screened.lower(start + g);
            uppers[start + g] = upper;
            best[g] = best[g] > upper ? best[g] : upper;
            best_lower[g] = best_lower[g] > lower ? best_lower[g] : lower;
        }
    }
    // At least k latents surely reach `least`: one that cannot is not among the k largest.
    Key least = threshold(best_lower, groups, k, k / 8);
    Size count = 0;
    for (Size g = 0; g < groups; ++g) {
        if (best[g] < least) continue;
        for (Size j = g; j < d_sae; j += groups) {
            search.latents[count] = static_cast<int32_t>(j);
            count += uppers[j] >= least;
        }
    }
    for (Size c = 0; c < count; ++c) search.lower_keys[c] = screened.lower(search.latents[c]);
    least = threshold(search.lower_keys.data(), count, k, 0);
    Size candidates = 0;
    for (Size c = 0; c < count; ++c) {
        const int32_t latent = search.latents[c];
        search.latents[candidates] = latent;
        candidates += uppers[latent] >= least;
    }
    return candidates;
}

// The candidates of a block of tokens, scored latent by latent: each row of W_enc is then read once
// for all tokens of the block, whose inputs stay in the cache.
struct Candidates {
    std::vector<int32_t> latents, tokens, order;
    std::vector<Size> ends; // of each token's candidates
    std::vector<float> scores;
    std::vector<Size> offsets;

    explicit Candidates(Size d_sae) : offsets(d_sae + 1) {}

    void clear() {
        latents.clear();
        tokens.clear();
        ends.clear();
    }

    void append(const int32_t* chosen, Size count) {
        tokens.insert(tokens.end(), count, static_cast<int32_t>(ends.size()));
        latents.insert(latents.end(), chosen, chosen + count);
        ends.push_back(static_cast<Size>(latents.size()));
    }

    void score(const float* inputs, const float* W_enc, const float* b_enc, Size d_model) {
        sort_by_latent();
        scores.resize(latents.size());
        std::vector<const float*> rows(ends.size());
        std::vector<float> dots(ends.size());
        for (Size j = 0; j + 1 < static_cast<Size>(offsets.size()); ++j) {
            const Size begin = j == 0 ? 0 : offsets[j - 1], count = offsets[j] - begin;
            for (Size e = 0; e < count; ++e)
                rows[e] = row(inputs, tokens[order[begin + e]], d_model);
            dot_rows(row(W_enc, j, d_model), rows.data(), dots.data(), count, d_model);
            for (Size e = 0; e < count; ++e) scores[order[begin + e]] = dots[e] + b_enc[j];
        }
    }

private:
    // A counting sort; it leaves in offsets[j] where latent j ends.
    void sort_by_latent() {
        std::fill(offsets.begin(), offsets.end(), 0);
        for (const int32_t latent : latents) ++offsets[latent + 1];
        for (size_t j = 1; j < offsets.size(); ++j) offsets[j] += offsets[j - 1];
        order.resize(latents.size());
        for (size_t c = 0; c < latents.size(); ++c)
            order[offsets[latents[c]]++] = static_cast<int32_t>(c);
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

// Each row rounded to bfloat16, its norm, and the norm of what the rounding changed; neither norm
// too small, whatever squares are too small for a float.
void groupsae_round_rows(Size threads, const float* rows, Size count, Size width,
                         uint16_t* rounded, float* norms, float* errors) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (Size r = 0; r < count; ++r) {
        const float* source = row(rows, r, width);
        uint16_t* __restrict target = rounded + r * width;
        float squares = 0, error_squares = 0;
#pragma omp simd reduction(+ : squares, error_squares)
        for (Size m = 0; m < width; ++m) {
            target[m] = to_bfloat16(source[m]);
            const float error = source[m] - from_bfloat16(target[m]);
            squares += source[m] * source[m];
            error_squares += error * error;
        }
        const float lost = static_cast<float>(width) * FLT_MIN;
        norms[r] = std::sqrt(squares + lost);
        errors[r] = std::sqrt(error_squares + lost);
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

// The same from products [token, d_sae] in bfloat16, without the bias. Every latent that may be
// among the k largest by its error bound is scored again in float32, so nothing is lost. Where more
// than `most` latents may be, `unresolved` is set and the token is left to the caller.
void groupsae_screen(Size threads, const uint16_t* products, Size tokens, Size d_sae, Size d_model,
                     Size k, const float* inputs, const float* input_norms,
                     const float* input_errors, const float* W_enc, const float* b_enc,
                     const float* norms, const float* errors, Size most, float* values,
                     int32_t* indices, uint8_t* unresolved) {
    const Size share = (tokens + threads - 1) / threads;
    const Size block = std::clamp(share, kFewestTokens, kMostTokens);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Search search(d_sae, k);
        Candidates candidates(d_sae);
#pragma omp for schedule(dynamic, 1)
        for (Size start = 0; start < tokens; start += block) {
            const Size end = std::min(tokens, start + block);
            candidates.clear();
            for (Size t = start; t < end; ++t) {
                const Bound bound(input_norms[t], input_errors[t], d_model);
                const Screened screened{products + t * d_sae, b_enc, norms, errors, bound};
                const Size count = screen_row(search, screened, d_sae, k);
                unresolved[t] = count > most;
                candidates.append(search.latents.data(), unresolved[t] ? 0 : count);
            }
            candidates.score(row(inputs, start, d_model), W_enc, b_enc, d_model);
            Size first = 0;
            for (Size t = start; t < end; ++t) {
                const Size last = candidates.ends[t - start];
                choose(search.keys, candidates.scores.data() + first,
                       candidates.latents.data() + first, last - first, k, row(values, t, k),
                       indices + t * k);
                first = last;
            }
        }
    }
}

// error = sum of the active decoder rows + bias - target, its squares' sum for each token, and
// products[t, i] = error[t] . W_dec[indices[t, i]] (0 where the latent is not active). `bias` may
// be null.
void groupsae_decode(Size threads, const float* values, const int32_t* indices, const float* W_dec,
                     const float* bias, const float* target, Size tokens, Size k, Size d_model,
                     float* error, float* squares, float* products) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        std::vector<const float*> rows(k);
        std::vector<float> weights(k), dots(k);
        std::vector<Size> places(k);
#pragma omp for schedule(static)
        for (Size t = 0; t < tokens; ++t) {
            Size active = 0;
            for (Size i = t * k; i < (t + 1) * k; ++i) {
                products[i] = 0;
                if (values[i] == 0) continue;
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

// One step of Adam on each row of `weights`: m and v are the running means of the gradient and of its
// square; `rate` is the learning rate over m's bias correction, `unbias` the root of v's inverse
// one. The gradient is first multiplied by `factor`. With `on_sphere` rows have unit norm: the
// gradient's component along the row is left out, and the row is brought back to unit norm.
void groupsae_adam(Size threads, const float* gradients, Size count, Size width, float factor,
                   float beta1, float beta2, float rate, float unbias, float epsilon,
                   Size on_sphere, float* weights, float* means, float* squares) {
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
            m[i] = beta1 * m[i] + (1 - beta1) * gradient;
            v[i] = beta2 * v[i] + (1 - beta2) * gradient * gradient;
            w[i] -= rate * m[i] / (std::sqrt(v[i]) * unbias + epsilon);
            norm += w[i] * w[i];
        }
        if (!on_sphere) continue;
        const float length = std::max(std::sqrt(norm), FLT_MIN);
        for (Size i = 0; i < width; ++i) w[i] /= length;
    }
}

} // extern "C"
