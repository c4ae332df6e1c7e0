// The gradients of native.cpp, with scores computed anew for each tile: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - Σ dO ∘ O),
// dQ = dS K, dK = dSᵀ Q. Scores stand with keys as rows: so Pᵀ and dSᵀ are rows of products with dO and Q, and dSᵀ,
// written a second time as units, is multiplied by Kᵀ.
#include "native.h"

// Mirrored in native.py. `call.out` and `call.lse` are query's gradient and the forward's lse; `call.key_units` and
// `call.value_units` hold rows [16, D] of each unit.
struct Gradient {
    Call call;
    int64_t parts, result_stride[3], grad_stride[3];
    const void *result, *grad;
    void* key_columns;
    float *key_sums, *value_sums;
};

namespace {

template <class Kind>
struct GradWorker {
    using Element = typename Kind::Element;
    static constexpr int64_t KEYS = UNITS * LANES;
    const Gradient& gradient;
    const Call& call;
    const int64_t D, size;
    // Scratch, in the order of `bytes`.
    float *change, *delta, *power, *weights;
    Element *rows, *grads, *outs, *query_along, *grad_along, *query_across, *grad_across;
    Element *powers, *changes, *change_units, *patched;
    // The tile and the units at hand.
    int64_t panels = 0, units = 0;
    float *key_sums = nullptr, *value_sums = nullptr;
    const Element *keys[UNITS], *values[UNITS], *columns[UNITS];
    const float* weight[UNITS];
    int64_t place[UNITS];

    GradWorker(const Gradient& g, char* scratch) : gradient(g), call(g.call), D(call.padded_dim), size(D * LANES) {
        change = reinterpret_cast<float*>(scratch);
        delta = change + ROWS * D;
        power = delta + 2 * ROWS;
        weights = power + GROUP * WIDE * LANES;
        Element* next = reinterpret_cast<Element*>(weights + KEYS);
        for (Element** each : {&rows, &grads, &outs, &query_along, &grad_along, &query_across, &grad_across}) {
            *each = next;
            next += ROWS * D;
        }
        for (Element** each : {&powers, &changes, &change_units}) {
            *each = next;
            next += ROWS * KEYS;
        }
        patched = next;
    }

    static int64_t bytes(int64_t D) {
        return sizeof(float) * (ROWS * D + 2 * ROWS + GROUP * WIDE * LANES + KEYS) +
               sizeof(Element) * (7 * ROWS * D + 3 * ROWS * KEYS + 3 * KEYS * D);
    }

    // Tiles `part`, `part` + parts, … of a head, whose sums no other thread writes: the same sums in the same order always.
    void run(int64_t entry, int64_t head, int64_t part) {
        const int64_t whole = entry * call.heads + head, table = call.blocks * call.block_units * size;
        key_sums = gradient.key_sums + (whole * gradient.parts + part) * table;
        value_sums = gradient.value_sums + (whole * gradient.parts + part) * table;
        for (int64_t tile = part; tile < call.tiles; tile += gradient.parts)
            for (int64_t first = 0; first < call.tile; first += ROWS) run_tile(entry, head, tile, first);
    }

    void run_tile(int64_t entry, int64_t head, int64_t tile, int64_t first) {
        const int32_t* map = call.query_rows + head * call.query_rows_stride + tile * call.tile + first;
        const int64_t held = std::min(ROWS, call.tile - first), whole = entry * call.heads + head;
        const int64_t list = entry * call.list_stride[0] + head * call.list_stride[1] + tile;
        if (!call.count[list]) return;
        read_tile(entry, head, map, held);
        std::memset(change, 0, ROWS * D * sizeof(float));
        const int64_t words = (call.block + 31) / 32;
        const int32_t* pool = call.pool + call.start[list];
        const int32_t* bits = call.row_masks + call.mask_start[list] * words;
        const bool every = call.count[list] < 0;
        const int64_t count = every ? call.level_blocks : call.count[list], masked = call.masked_count[list];
        for (int64_t i = 0; i < count; ++i)
            for (int64_t u = 0; u < call.block_units; ++u) {
                const int64_t unit = (every ? i : pool[i]) * call.block_units + u;
                add(whole * call.blocks * call.block_units, unit, shown(i < masked ? bits + i * words : nullptr, u * LANES));
                if (units == UNITS) flush();
            }
        flush();
        alignas(64) float row[LANES];
        for (int64_t r = 0; r < held; ++r) {
            if (map[r] < 0) continue;
            for (int64_t d = 0; d < call.head_dim; d += LANES) {
                for (int64_t i = 0; i < LANES; ++i) row[i] = call.scale * change[(d + i) * ROWS + r];
                write<Kind>(call, whole * call.tokens + map[r], d, vec::load(row));
            }
        }
    }

    void read_tile(int64_t entry, int64_t head, const int32_t* map, int64_t held) {
        panels = (held + LANES - 1) / LANES;
        for (Element* each : {rows, grads, outs}) std::memset(each, 0, panels * size * sizeof(Element));
        for (int64_t r = 0; r < panels * LANES; ++r) {
            // A query that reads nothing, or is none, gets exponentials of 0.
            delta[r] = 0;
            delta[ROWS + r] = INFINITY;
            if (r >= held || map[r] < 0) continue;
            const float sum = call.lse[(entry * call.heads + head) * call.tokens + map[r]];
            if (sum == NOTHING) continue;
            using From = Row<Element>;
            std::memcpy(rows + r * D, From::at(call.query, call.query_stride, entry, head, map[r]), call.head_dim * sizeof(Element));
            std::memcpy(grads + r * D, From::at(gradient.grad, gradient.grad_stride, entry, head, map[r]), call.head_dim * sizeof(Element));
            std::memcpy(outs + r * D, From::at(gradient.result, gradient.result_stride, entry, head, map[r]), call.head_dim * sizeof(Element));
            Floats dot = vec::spread(0);
            for (int64_t d = 0; d < D; d += LANES) dot = vec::multiply_add(Kind::load(grads + r * D + d), Kind::load(outs + r * D + d), dot);
            delta[r] = vec::sum_of(dot);
            delta[ROWS + r] = sum * static_cast<float>(M_LOG2E);
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
            lay_along<Kind>(rows + panel * size, D, query_along + panel * size);
            lay_along<Kind>(grads + panel * size, D, grad_along + panel * size);
            lay_across<Kind>(rows + panel * size, D, query_across + panel * size);
            lay_across<Kind>(grads + panel * size, D, grad_across + panel * size);
        }
    }

    void add(int64_t before, int64_t unit, Mask mask) {
        keys[units] = static_cast<const Element*>(call.key_units) + (before + unit) * size;
        values[units] = static_cast<const Element*>(call.value_units) + (before + unit) * size;
        columns[units] = static_cast<const Element*>(gradient.key_columns) + (before + unit) * size;
        weight[units] = call.unit_weight + (before + unit) * LANES;
        place[units] = unit * size;
        if (mask != 0xffff) {
            // What a row mask hides may hold NaN, which even a weight of 0 would spread.
            Element* copies[3];
            for (int64_t i = 0; i < 3; ++i) copies[i] = patched + (3 * units + i) * size;
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const bool kept = mask >> lane & 1;
                lay_row(kept ? keys[units] + lane * D : nullptr, D, D, copies[0] + lane * D);
                lay_row(kept ? values[units] + lane * D : nullptr, D, D, copies[1] + lane * D);
            }
            for (int64_t d = 0; d < D; ++d) Kind::keep(copies[2] + d * LANES, columns[units] + d * LANES, mask);
            vec::store(weights + units * LANES, vec::select(mask, vec::load(weight[units]), vec::spread(NOTHING)));
            keys[units] = copies[0], values[units] = copies[1], columns[units] = copies[2], weight[units] = weights + units * LANES;
        }
        ++units;
    }

    void flush() {
        for (int64_t unit = 0; unit < units; ++unit)
            for (int64_t half = 0; half < LANES; half += GROUP) {
                int64_t panel = 0;
                for (; panel + WIDE <= panels; panel += WIDE) score<WIDE>(unit, half, panel);
                for (; panel < panels; ++panel) score<1>(unit, half, panel);
                int64_t d = 0;
                for (; d + WIDE * LANES <= D; d += WIDE * LANES) sum<WIDE>(unit, half, d);
                for (; d < D; d += LANES) sum<1>(unit, half, d);
            }
        if (units)
            for (int64_t d = 0; d < D; d += GROUP) {
                int64_t panel = 0;
                for (; panel + WIDE <= panels; panel += WIDE) pull<WIDE>(d, panel);
                for (; panel < panels; ++panel) pull<1>(d, panel);
            }
        units = 0;
    }

    template <int U>
    static void clear(Floats (&sums)[GROUP][U]) {
#pragma GCC unroll 16
        for (int i = 0; i < GROUP * U; ++i) sums[i / U][i % U] = vec::spread(0);
    }

    // Pᵀ and dSᵀ of 8 keys and 16 U queries.
    template <int U>
    void score(int64_t unit, int64_t half, int64_t panel) {
        Floats sums[GROUP][U];
        const Element* along[U];
        for (int u = 0; u < U; ++u) along[u] = query_along + (panel + u) * size;
        clear<U>(sums);
        multiply<Kind>(sums, keys[unit] + half * D, D, along, D / Kind::step);
        const Floats factor = vec::spread(call.scale * static_cast<float>(M_LOG2E));
        Element* to = powers + (unit * LANES + half) * ROWS + panel * LANES;
#pragma GCC unroll 8
        for (int r = 0; r < GROUP; ++r)
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u) {
                const Floats lse = vec::load(delta + ROWS + (panel + u) * LANES);
                const Floats x = exp2<Kind>(vec::subtract(vec::multiply_add(sums[r][u], factor, vec::spread(weight[unit][half + r])), lse));
                vec::store(power + (r * U + u) * LANES, x);
                Kind::store(to + r * ROWS + u * LANES, x);
            }
        for (int u = 0; u < U; ++u) along[u] = grad_along + (panel + u) * size;
        clear<U>(sums);
        multiply<Kind>(sums, values[unit] + half * D, D, along, D / Kind::step);
        to = changes + (unit * LANES + half) * ROWS + panel * LANES;
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
            const Floats product = vec::load(delta + (panel + u) * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < GROUP; ++r) {
                sums[r][u] = vec::multiply(vec::load(power + (r * U + u) * LANES), vec::subtract(sums[r][u], product));
                Kind::store(to + r * ROWS + u * LANES, sums[r][u]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < GROUP; r += 2)
                Kind::store_steps(change_units + (unit * ROWS + (panel + u) * LANES) * LANES + (half + r) * LANES, sums[r][u], sums[r + 1][u]);
        }
    }

    // Add this tile's part of dV and dK to 8 keys' sums, 16 U columns of them.
    template <int U>
    void sum(int64_t unit, int64_t half, int64_t d) {
        const int64_t at = place[unit] + half * D + d;
        for (int pass = 0; pass < 2; ++pass) {
            float* to = (pass ? key_sums : value_sums) + at;
            const Element* from = (pass ? changes : powers) + (unit * LANES + half) * ROWS;
            const Element* across = (pass ? query_across : grad_across) + d * LANES;
            for (int64_t r = 0; r < GROUP; ++r)
                for (int64_t u = 0; u < U; ++u) _mm_prefetch(reinterpret_cast<const char*>(to + r * D + u * LANES), _MM_HINT_T0);
            Floats sums[GROUP][U];
            clear<U>(sums);
            for (int64_t panel = 0; panel < panels; ++panel) {
                const Element* many[U];
                for (int u = 0; u < U; ++u) many[u] = across + panel * size + u * LANES * LANES;
                multiply<Kind>(sums, from + panel * LANES, ROWS, many, LANES / Kind::step);
            }
#pragma GCC unroll 16
            for (int i = 0; i < GROUP * U; ++i) {
                float* here = to + i / U * D + i % U * LANES;
                vec::store(here, vec::add(vec::load(here), sums[i / U][i % U]));
            }
        }
    }

    // Add to 8 components of 16 U queries' gradients.
    template <int U>
    void pull(int64_t d, int64_t panel) {
        Floats sums[GROUP][U];
#pragma GCC unroll 16
        for (int i = 0; i < GROUP * U; ++i) sums[i / U][i % U] = vec::load(change + (d + i / U) * ROWS + (panel + i % U) * LANES);
        for (int64_t unit = 0; unit < units; ++unit) {
            const Element* many[U];
            for (int u = 0; u < U; ++u) many[u] = change_units + (unit * ROWS + (panel + u) * LANES) * LANES;
            multiply<Kind>(sums, columns[unit] + d * LANES, LANES, many, LANES / Kind::step);
        }
#pragma GCC unroll 16
        for (int i = 0; i < GROUP * U; ++i) vec::store(change + (d + i / U) * ROWS + (panel + i % U) * LANES, sums[i / U][i % U]);
    }
};

template <class Kind>
void backward(const Gradient& gradient) {
    using Element = typename Kind::Element;
    const Call& call = gradient.call;
    const int64_t whole = call.batch * call.heads, units = call.blocks * call.block_units, size = call.padded_dim * LANES;
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static)
        for (int64_t index = 0; index < whole * units; ++index) {
            Element* keys = static_cast<Element*>(call.key_units) + index * size;
            Element* columns = static_cast<Element*>(gradient.key_columns) + index * size;
            const int64_t entry = index / units / call.heads, head = index / units % call.heads;
            read_unit<Kind>(call, entry, head, index % units, keys, static_cast<Element*>(call.value_units) + index * size, call.unit_weight + index * LANES);
            for (int64_t lane = 0; lane < LANES; ++lane)
                for (int64_t d = 0; d < call.padded_dim; ++d) columns[d * LANES + lane] = keys[lane * call.padded_dim + d];
        }
        GradWorker<Kind> worker(gradient, call.scratch + omp_get_thread_num() * GradWorker<Kind>::bytes(call.padded_dim));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < whole * gradient.parts; ++task) {
            const int64_t index = task / gradient.parts;
            worker.run(index / call.heads, index % call.heads, task % gradient.parts);
        }
    }
}

}  // namespace

extern "C" {

int64_t backward_scratch_bytes(int64_t narrow, int64_t padded_dim) {
#ifdef __AVX512BF16__
    if (narrow) return GradWorker<Brain>::bytes(padded_dim);
#endif
    return GradWorker<Single>::bytes(padded_dim);
}

void backward_float32(const Gradient* gradient) { backward<Single>(*gradient); }

#ifdef __AVX512BF16__
void backward_bfloat16(const Gradient* gradient) { backward<Brain>(*gradient); }
#endif
}
