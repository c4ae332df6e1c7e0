// Attention over a block list on a CPU with AVX2 or AVX-512, as one pass: no scores in memory, no gathered copies of K and V.
#include <type_traits>

#include "native.h"

namespace {

// Lay out one unit of a head's K, V and weights. Returns the longest key's square.
template <class Kind>
float lay_unit(const Call& call, int64_t entry, int64_t head, int64_t unit) {
    using Element = typename Kind::Element;
    const int64_t D = call.padded_dim, index = (entry * call.heads + head) * call.blocks * call.block_units + unit;
    alignas(64) Element keys[LANES * MOST_DIM], values[LANES * MOST_DIM];
    read_unit<Kind>(call, entry, head, unit, keys, values, call.unit_weight + index * LANES);
    Element* along = static_cast<Element*>(call.key_units) + index * D * LANES;
    lay_along<Kind>(keys, D, along);
    lay_across<Kind>(values, D, static_cast<Element*>(call.value_units) + index * D * LANES);
    return longest_of<Kind>(along, D);
}

template <class Kind>
struct Worker {
    using Element = typename Kind::Element;
    const Call& call;
    const int64_t D = call.padded_dim, size = D * LANES, stride = UNITS * LANES;
    // A tile's rows, and room for those of the last group that are none.
    static constexpr int64_t ROOM = ROWS + (ROWS % TALL ? LANES : 0);
    // Scratch: queries [ROOM, D], scores and their exponentials [ROOM, stride], outputs [ROOM, D], sums [ROOM, LANES].
    float* out;
    float* sums;
    float* logits;
    float* most;
    Element* query;
    Element* power;
    Element* patched;
    // The units at hand.
    int64_t units = 0;
    const Element* keys[UNITS];
    const Element* values[UNITS];
    const float* weights[UNITS];
    Mask masks[UNITS];
    // The tile at hand.
    int64_t rows = 0;
    bool shifted = false;

    Worker(const Call& c, char* scratch) : call(c) {
        out = reinterpret_cast<float*>(scratch);
        sums = out + ROOM * D;
        logits = sums + ROOM * LANES;
        most = logits + ROOM * stride;
        query = reinterpret_cast<Element*>(most + ROOM);
        power = query + ROOM * D;
        patched = power + ROOM * stride;
    }

    // Scratch of one worker, a multiple of a cache line.
    static int64_t bytes(int64_t D) {
        const int64_t stride = UNITS * LANES;
        return sizeof(float) * ROOM * (D + LANES + stride + 1) + sizeof(Element) * (ROOM * (D + stride) + UNITS * LANES * D);
    }

    void run(int64_t entry, int64_t head, int64_t tile, int64_t first) {
        const int32_t* map = call.query_rows + head * call.query_rows_stride + tile * call.tile + first;
        const int64_t held = std::min(ROWS, call.tile - first);
        const int64_t list = entry * call.list_stride[0] + head * call.list_stride[1] + tile, whole = entry * call.heads + head;
        const int64_t rest = held % TALL;
        rows = held - rest + (rest == 0 ? 0 : rest <= GROUP ? GROUP : TALL);
        std::memset(query, 0, rows * D * sizeof(Element));
        std::memset(out, 0, rows * D * sizeof(float));
        std::memset(sums, 0, rows * LANES * sizeof(float));
        std::fill(most, most + rows, NOTHING);
        float longest = 0;
        for (int64_t row = 0; row < held; ++row) {
            if (map[row] < 0) continue;
            const auto* from = static_cast<const Element*>(call.query) + entry * call.query_stride[0] + head * call.query_stride[1] + map[row] * call.query_stride[2];
            std::memcpy(query + row * D, from, call.head_dim * sizeof(Element));
            longest = larger(longest, squared<Kind>(query + row * D, D));
        }
        // By Cauchy-Schwarz; without an overflow to fear, no maximum is needed. NaN takes the careful way.
        const float bound = std::fabs(call.scale) * static_cast<float>(M_LOG2E) * std::sqrt(longest) * std::sqrt(call.longest[2 * whole]) + call.longest[2 * whole + 1];
        shifted = !(bound <= SAFE_POWER);

        units = 0;
        const int32_t* pool = call.pool + call.start[list];
        const int32_t* bits = call.row_masks + call.mask_start[list] * ((call.block + 31) / 32);
        const bool every = call.count[list] < 0;
        const int64_t count = every ? call.level_blocks : call.count[list], masked = call.masked_count[list];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t block = whole * call.blocks + (every ? i : pool[i]);
            for (int64_t u = 0; u < call.block_units; ++u) {
                add(block * call.block_units + u, i < masked ? bits + i * ((call.block + 31) / 32) : nullptr, u * LANES);
                if (units == UNITS) flush();
            }
        }
        flush();
        for (int64_t row = 0; row < held; ++row)
            if (map[row] >= 0) finish(row, whole * call.tokens + map[row]);
    }

    void add(int64_t unit, const int32_t* bits, int64_t first) {
        keys[units] = static_cast<const Element*>(call.key_units) + unit * size;
        values[units] = static_cast<const Element*>(call.value_units) + unit * size;
        weights[units] = call.unit_weight + unit * LANES;
        masks[units] = shown(bits, first);
        if (masks[units] != 0xffff) {
            // What a row mask hides may hold NaN, which even a weight of 0 would spread.
            Element* copy = patched + units * size;
            Floats kept[LANES / Kind::step];
            for (int64_t lane = 0; lane < LANES; lane += Kind::step) kept[lane / Kind::step] = Kind::of_rows(masks[units] >> lane);
            for (int64_t at = 0; at < size; at += LANES * Kind::step)
                Kind::store_bits(copy + at, vec::bits_of_both(Kind::bits(values[units] + at), kept[at / LANES / Kind::step % (LANES / Kind::step)]));
            values[units] = copy;
        }
        ++units;
    }

    void flush() {
        if (!units) return;
        if (shifted) {
            scores<true>();
            shift();
        } else {
            scores<false>();
        }
        int64_t d = 0;
        for (; d + WIDE * LANES <= D; d += WIDE * LANES)
            by_groups([&](auto R, int64_t row) { weigh<WIDE, R>(row, d); });
        if constexpr (WIDE > 1)
            for (; d < D; d += LANES)
                by_groups([&](auto R, int64_t row) { weigh<1, R>(row, d); });
        units = 0;
    }

    // All rows, as many at a time as registers hold, and what is left.
    template <class Run>
    void by_groups(Run run) {
        int64_t row = 0;
        for (; row + TALL <= rows; row += TALL) run(std::integral_constant<int, TALL>(), row);
        if constexpr (GROUP < TALL)
            if (row < rows) run(std::integral_constant<int, GROUP>(), row);
    }

    template <bool Shifted>
    void scores() {
        int64_t unit = 0;
        for (; unit + WIDE <= units; unit += WIDE)
            by_groups([&](auto R, int64_t row) {
                fetch(unit, row, R);
                score<Shifted, WIDE, R>(row, unit);
            });
        if constexpr (WIDE > 1)
            for (; unit < units; ++unit)
                by_groups([&](auto R, int64_t row) { score<Shifted, 1, R>(row, unit); });
    }

    // A part, as large as so many rows are of the tile, of the keys that are multiplied next and of the values soon after.
    void fetch(int64_t unit, int64_t row, int64_t count) {
        const int64_t bytes = WIDE * size * sizeof(Element), first = bytes * row / rows / 64 * 64, last = bytes * (row + count) / rows;
        for (int64_t at = first; at < last; at += 64) {
            const int64_t here = unit + at / (bytes / WIDE), inside = at % (bytes / WIDE);
            if (here + WIDE < units) _mm_prefetch(reinterpret_cast<const char*>(keys[here + WIDE]) + inside, _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(values[here]) + inside, _MM_HINT_T1);
        }
    }

    template <bool Shifted, int U, int R>
    void score(int64_t row, int64_t unit) {
        Floats sum[R][U];
        const Element* columns[U];
        for (int u = 0; u < U; ++u) columns[u] = keys[unit + u];
#pragma GCC unroll 16
        for (int i = 0; i < R * U; ++i) sum[i / U][i % U] = vec::spread(0);
        multiply<Kind>(sum, query + row * D, D, columns, D / Kind::step);
        const Floats factor = vec::spread(call.scale * static_cast<float>(M_LOG2E)), nothing = vec::spread(NOTHING);
        // Copies, since any store might change what members point to.
        Floats weight[U];
        Mask mask[U];
        for (int u = 0; u < U; ++u) weight[u] = vec::load(weights[unit + u]), mask[u] = masks[unit + u];
        float* const total_of = sums;
        float* const logits_of = logits;
        Element* const power_of = power;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Floats total = vec::load(total_of + (row + r) * LANES);
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u) {
                Floats x = vec::multiply_add(sum[r][u], factor, weight[u]);
                x = vec::select(mask[u], x, nothing);
                const int64_t at = (row + r) * stride + (unit + u) * LANES;
                if (Shifted) {
                    vec::store(logits_of + at, x);
                } else {
                    x = exp2_of_safe<Kind>(x);
                    total = vec::add(total, x);
                    Kind::store(power_of + at, x);
                }
            }
            if (!Shifted) vec::store(total_of + (row + r) * LANES, total);
        }
    }

    // Exponentials of the logits less the row's maximum so far; what was summed under a smaller one is scaled down.
    void shift() {
        for (int64_t row = 0; row < rows; ++row) {
            const float* from = logits + row * stride;
            Floats highest = vec::spread(most[row]);
            for (int64_t unit = 0; unit < units; ++unit) highest = vec::larger(highest, vec::load(from + unit * LANES));
            const float now = std::max(vec::largest_of(highest), -3e38f);
            if (now > most[row]) {
                const Floats factor = vec::spread(std::exp2(most[row] - now));
                for (int64_t d = 0; d < D; d += LANES)
                    vec::store(out + row * D + d, vec::multiply(factor, vec::load(out + row * D + d)));
                vec::store(sums + row * LANES, vec::multiply(factor, vec::load(sums + row * LANES)));
                most[row] = now;
            }
            Floats total = vec::load(sums + row * LANES);
            for (int64_t unit = 0; unit < units; ++unit) {
                const Floats x = exp2_of_safe<Kind>(vec::subtract(vec::load(from + unit * LANES), vec::spread(now)));
                total = vec::add(total, x);
                Kind::store(power + row * stride + unit * LANES, x);
            }
            vec::store(sums + row * LANES, total);
        }
    }

    // Add R rows' weighted values of 16 U columns to the outputs.
    template <int U, int R>
    void weigh(int64_t row, int64_t d) {
        Floats sum[R][U];
#pragma GCC unroll 16
        for (int i = 0; i < R * U; ++i) sum[i / U][i % U] = vec::load(out + (row + i / U) * D + d + i % U * LANES);
        for (int64_t unit = 0; unit < units; ++unit) {
            const Element* columns[U];
            for (int u = 0; u < U; ++u) columns[u] = values[unit] + (d + u * LANES) * LANES;
            multiply<Kind>(sum, power + row * stride + unit * LANES, stride, columns, LANES / Kind::step);
        }
#pragma GCC unroll 16
        for (int i = 0; i < R * U; ++i) vec::store(out + (row + i / U) * D + d + i % U * LANES, sum[i / U][i % U]);
    }

    void finish(int64_t row, int64_t token) {
        const float sum = vec::sum_of(vec::load(sums + row * LANES));
        const float over = sum == 0 ? 0 : 1 / sum;
        call.lse[token] = sum == 0 ? NOTHING : static_cast<float>(M_LN2) * (std::log2(sum) + (shifted ? most[row] : 0));
        for (int64_t d = 0; d < call.head_dim; d += LANES)
            write<Kind>(call, token, d, vec::multiply(vec::spread(over), vec::load(out + row * D + d)));
    }
};

// Lay out all rows of all heads; called by every thread of a parallel region.
template <class Kind>
void lay(const Call& call) {
    const int64_t whole = call.batch * call.heads, units = call.blocks * call.block_units;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < whole; ++i) call.longest[2 * i] = call.longest[2 * i + 1] = 0;
    for (int64_t i = 0; i < whole; ++i) {
        float longest = 0, heaviest = 0;
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < units; ++unit) {
            longest = larger(longest, lay_unit<Kind>(call, i / call.heads, i % call.heads, unit));
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const float weight = call.unit_weight[(i * units + unit) * LANES + lane];
                if (weight > NOTHING) heaviest = larger(heaviest, std::fabs(weight));
            }
        }
#pragma omp critical
        {
            call.longest[2 * i] = larger(call.longest[2 * i], longest);
            call.longest[2 * i + 1] = larger(call.longest[2 * i + 1], heaviest);
        }
    }
#pragma omp barrier
}

template <class Kind>
void attend(const Call& call) {
    const int64_t scratch_bytes = Worker<Kind>::bytes(call.padded_dim);
    const int64_t parts = (call.tile + ROWS - 1) / ROWS, tasks = call.batch * call.heads * call.tiles * parts;
#pragma omp parallel num_threads(call.threads)
    {
        if (!call.laid) lay<Kind>(call);
        Worker<Kind> worker(call, call.scratch + omp_get_thread_num() * scratch_bytes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t tile = task / parts % call.tiles, index = task / parts / call.tiles;
            worker.run(index / call.heads, index % call.heads, tile, task % parts * ROWS);
        }
    }
}

}  // namespace

extern "C" {

int64_t scratch_bytes(int64_t narrow, int64_t padded_dim) {
#ifdef __AVX512BF16__
    if (narrow) return Worker<Brain>::bytes(padded_dim);
#endif
    return Worker<Single>::bytes(padded_dim);
}

void attend_float32(const Call* call) { attend<Single>(*call); }

#ifdef __AVX512BF16__
void attend_bfloat16(const Call* call) { attend<Brain>(*call); }
#endif
}
