// The softmax mass of each query tile on each level-0 block: scores, exponentials and sums in registers.
#include "native.h"

namespace {

// Lay out one unit of a head's keys and weights; values are not looked at.
template <class Kind>
void lay_keys(const Call& call, int64_t entry, int64_t head, int64_t unit) {
    using Element = typename Kind::Element;
    const int64_t D = call.padded_dim, index = (entry * call.heads + head) * call.blocks * call.block_units + unit;
    alignas(64) Element keys[LANES * MOST_DIM], values[LANES * MOST_DIM];
    read_unit<Kind>(call, entry, head, unit, keys, values, call.unit_weight + index * LANES);
    lay_along<Kind>(keys, D, static_cast<Element*>(call.key_units) + index * D * LANES);
}

template <class Kind>
struct Weigher {
    using Element = typename Kind::Element;
    const Call& call;
    const int64_t D = call.padded_dim, size = D * LANES, units = call.level_blocks * call.block_units;
    // Scratch: queries [ROWS, D], and their lse in powers of two.
    float* power;
    Element* query;

    Weigher(const Call& c, char* scratch) : call(c) {
        power = reinterpret_cast<float*>(scratch);
        query = reinterpret_cast<Element*>(power + ROWS);
    }

    // Scratch of one worker, a multiple of a cache line.
    static int64_t bytes(int64_t D) { return sizeof(float) * ROWS + sizeof(Element) * ROWS * D; }

    void run(int64_t entry, int64_t head, int64_t tile) {
        const int64_t whole = entry * call.heads + head;
        float* to = static_cast<float*>(call.out) + (whole * call.tiles + tile) * call.level_blocks;
        std::fill(to, to + call.level_blocks, 0.0f);
        for (int64_t first = 0; first < call.tile; first += ROWS) {
            const int64_t rows = take(entry, head, tile, first);
            const Element* keys = static_cast<const Element*>(call.key_units) + whole * call.blocks * call.block_units * size;
            const float* weights = call.unit_weight + whole * call.blocks * call.block_units * LANES;
            int64_t unit = 0;
            for (; unit + WIDE <= units; unit += WIDE) weigh<WIDE>(rows, unit, keys + unit * size, weights + unit * LANES, to);
            for (; unit < units; ++unit) weigh<1>(rows, unit, keys + unit * size, weights + unit * LANES, to);
        }
    }

    // Gather 128 queries or fewer of the tile. One that counts for nothing gets an infinite lse.
    int64_t take(int64_t entry, int64_t head, int64_t tile, int64_t first) {
        const int32_t* map = call.query_rows + head * call.query_rows_stride + tile * call.tile + first;
        const int64_t held = std::min(ROWS, call.tile - first), rows = (held + GROUP - 1) / GROUP * GROUP;
        std::memset(query, 0, rows * D * sizeof(Element));
        std::fill(power, power + rows, INFINITY);
        for (int64_t row = 0; row < held; ++row) {
            if (map[row] < 0) continue;
            const float lse = call.lse[(entry * call.heads + head) * call.tokens + map[row]];
            if (lse == NOTHING) continue;
            power[row] = lse * static_cast<float>(M_LOG2E);
            const auto* from = static_cast<const Element*>(call.query) + entry * call.query_stride[0] + head * call.query_stride[1] + map[row] * call.query_stride[2];
            std::memcpy(query + row * D, from, call.head_dim * sizeof(Element));
        }
        return rows;
    }

    // Add to `to` what all rows put on U units.
    template <int U>
    void weigh(int64_t rows, int64_t unit, const Element* keys, const float* weights, float* to) {
        const Floats factor = vec::spread(call.scale * static_cast<float>(M_LOG2E));
        const Element* columns[U];
        Floats total[U];
        for (int u = 0; u < U; ++u) columns[u] = keys + u * size, total[u] = vec::spread(0);
        for (int64_t row = 0; row < rows; row += GROUP) {
            Floats sum[GROUP][U];
#pragma GCC unroll 16
            for (int i = 0; i < GROUP * U; ++i) sum[i / U][i % U] = vec::spread(0);
            multiply<Kind>(sum, query + row * D, D, columns, D / Kind::step);
#pragma GCC unroll 8
            for (int r = 0; r < GROUP; ++r) {
                const Floats less = vec::spread(power[row + r]);
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) {
                    const Floats x = vec::multiply_add(sum[r][u], factor, vec::load(weights + u * LANES));
                    total[u] = vec::add(total[u], exp2<Kind>(vec::subtract(x, less)));
                }
            }
        }
        for (int u = 0; u < U; ++u) to[(unit + u) / call.block_units] += vec::sum_of(total[u]);
    }
};

template <class Kind>
void weigh_blocks(const Call& call) {
    const int64_t scratch_bytes = Weigher<Kind>::bytes(call.padded_dim);
    const int64_t whole = call.batch * call.heads, units = call.level_blocks * call.block_units, tasks = whole * call.tiles;
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < whole; ++i)
            for (int64_t unit = 0; unit < units; ++unit) lay_keys<Kind>(call, i / call.heads, i % call.heads, unit);
        Weigher<Kind> weigher(call, call.scratch + omp_get_thread_num() * scratch_bytes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t index = task / call.tiles;
            weigher.run(index / call.heads, index % call.heads, task % call.tiles);
        }
    }
}

}  // namespace

extern "C" {

int64_t mass_scratch_bytes(int64_t narrow, int64_t padded_dim) {
#ifdef __AVX512BF16__
    if (narrow) return Weigher<Brain>::bytes(padded_dim);
#endif
    return Weigher<Single>::bytes(padded_dim);
}

void mass_float32(const Call* call) { weigh_blocks<Single>(*call); }

#ifdef __AVX512BF16__
void mass_bfloat16(const Call* call) { weigh_blocks<Brain>(*call); }
#endif
}
