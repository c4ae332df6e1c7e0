// Weighted means of rows for every coarser level in one pass: a chunk of rows is read once and stays in cache.
#include "native.h"

// Mirrored field by field in native_pool.py. Strides are in elements; H|1 and B|1 dimensions have stride 0.
struct Pool {
    int64_t batch, heads, head_dim, rows, levels, chunk, pooled_rows, threads;
    int64_t key_stride[3], value_stride[3], share_stride[3], key_rows_stride;  // of shares: level, batch, head
    const void *key, *value;
    const int32_t* key_rows;
    const float* shares;
    const int64_t *factors, *begins;
    void *pooled_key, *pooled_value;
};

namespace {

constexpr int64_t MOST_CHUNK = 256;

template <class Kind>
struct Pooler {
    using Element = typename Kind::Element;
    const Pool& pool;
    const Element* from[MOST_CHUNK];

    // The rows of one chunk of one head, of keys or of values, at every level.
    void run(int64_t entry, int64_t head, int64_t first, bool values) {
        const auto* base = static_cast<const Element*>(values ? pool.value : pool.key);
        const int64_t* stride = values ? pool.value_stride : pool.key_stride;
        const int32_t* map = pool.key_rows + head * pool.key_rows_stride;
        const int64_t last = std::min(pool.rows, first + pool.chunk);
        for (int64_t row = first; row < last; ++row)
            from[row - first] = map[row] < 0 ? nullptr : base + entry * stride[0] + head * stride[1] + map[row] * stride[2];
        auto* to = static_cast<Element*>(values ? pool.pooled_value : pool.pooled_key) + (entry * pool.heads + head) * pool.pooled_rows * pool.head_dim;
        for (int64_t level = 0; level < pool.levels; ++level) {
            const float* shares = pool.shares + level * pool.share_stride[0] + entry * pool.share_stride[1] + head * pool.share_stride[2] + first;
            const int64_t factor = pool.factors[level];
            for (int64_t row = first; row < last; row += factor) {
                Element* mean = to + (pool.begins[level] + row / factor) * pool.head_dim;
                const int64_t begin = row - first, end = std::min(begin + factor, last - first);
                int64_t d = 0;
                for (; d + 4 * LANES <= pool.head_dim; d += 4 * LANES) sum<4>(begin, end, shares, d, mean);
                for (; d < pool.head_dim; d += LANES) sum<1>(begin, end, shares, d, mean);
            }
        }
    }

    template <int U>
    void sum(int64_t begin, int64_t end, const float* shares, int64_t d, Element* mean) {
        const int64_t here = std::min(U * LANES, pool.head_dim - d);
        Floats total[U];
        for (int u = 0; u < U; ++u) total[u] = vec::spread(0);
        for (int64_t i = begin; i < end; ++i) {
            // What is not read may hold NaN.
            if (!from[i] || shares[i] == 0) continue;
            alignas(64) Element some[U * LANES];
            const Element* row = from[i] + d;
            if (here < U * LANES) {
                std::memset(some, 0, sizeof(some));
                std::memcpy(some, row, here * sizeof(Element));
                row = some;
            }
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) total[u] = vec::multiply_add(vec::spread(shares[i]), Kind::load(row + u * LANES), total[u]);
        }
        alignas(64) Element narrow[U * LANES];
        for (int u = 0; u < U; ++u) Kind::store(narrow + u * LANES, total[u]);
        std::memcpy(mean + d, narrow, here * sizeof(Element));
    }
};

template <class Kind>
void pool_rows(const Pool& pool) {
    const int64_t chunks = (pool.rows + pool.chunk - 1) / pool.chunk, tasks = 2 * pool.batch * pool.heads * chunks;
#pragma omp parallel num_threads(pool.threads)
    {
        Pooler<Kind> pooler{pool, {}};
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t index = task / 2 / chunks;
            pooler.run(index / pool.heads, index % pool.heads, task / 2 % chunks * pool.chunk, task % 2);
        }
    }
}

}  // namespace

extern "C" {

void pool_float32(const Pool* pool) { pool_rows<Single>(*pool); }

#ifdef __AVX512BF16__
void pool_bfloat16(const Pool* pool) { pool_rows<Brain>(*pool); }
#endif
}
