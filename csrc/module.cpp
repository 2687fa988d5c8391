// Python binding: plain addresses and numbers, so that the module is built without torch and fits every
// release of it. sparsifiner.ops.api checks shapes and dtypes, the custom operators see to the strides.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "core/sparsifiner.h"

namespace nb = nanobind;
namespace sp = sparsifiner;

namespace {

// Address, and strides of batch, head and token in elements; address 0 stands for None.
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using Grid = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

sp::Rows rows(const RowsTuple& t) {
  return {reinterpret_cast<const void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

sp::BlockGrid block_grid(const Grid& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

sp::DType dtype(bool bfloat16) { return bfloat16 ? sp::DType::bfloat16 : sp::DType::float32; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr const char* kPrecisions[] = {"same", "bfloat16", "int8"};  // in the order of sp::Precision

sp::Precision precision_of(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == kPrecisions[i]) return static_cast<sp::Precision>(i);
  throw std::invalid_argument("precision must be same, bfloat16 or int8, got " + name);
}

using KeysShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

sp::TileKeys tile_keys(const KeysShape& shape, bool bfloat16, float scale, bool sum, const RowsTuple& q,
                       const RowsTuple& k, uintptr_t log2_weight, uintptr_t indices) {
  sp::TileKeys p;
  std::tie(p.batch, p.heads, p.tokens, p.width, p.tiles, p.pooled_queries, p.first, p.count) = shape;
  p.dtype = dtype(bfloat16);
  p.scale = scale;
  p.sum = sum;
  p.q = rows(q);
  p.k = rows(k);
  p.log2_weight = pointer<const float>(log2_weight);
  p.indices = pointer<int32_t>(indices);
  return p;
}

}  // namespace

NB_MODULE(_native, m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.attr("interface") = 2;  // of these functions; sparsifiner.ops.cpu.binding names the one it calls
  m.def("levels", [] {
    std::vector<std::string> names;
    for (sp::Level level : sp::available_levels()) names.emplace_back(sp::level_name(level));
    return names;
  });
  m.def("reasons_against", [] {
    std::vector<std::tuple<std::string, std::string>> reasons;
    for (sp::Level level : sp::all_levels())
      if (const std::string why = sp::why_not(level); !why.empty()) reasons.emplace_back(sp::level_name(level), why);
    return reasons;
  });
  m.def("level", [] { return std::string(sp::level_name(sp::active_level())); });
  m.def("precisions", [] {
    std::vector<std::string> names;
    for (sp::Precision precision : sp::available_precisions())
      names.emplace_back(kPrecisions[static_cast<int>(precision)]);
    return names;
  });
  m.def("force_level", &sp::force_level, nb::arg("name"));
  m.def(
      "attend",
      [](const Shape& shape, bool bfloat16, float scale, const RowsTuple& q, const RowsTuple& k, const RowsTuple& v,
         uintptr_t tile_tokens, uintptr_t indices, uintptr_t bias, const RowsTuple& tail_k, const RowsTuple& tail_v,
         uintptr_t tail_bias, uintptr_t out, int threads, const std::string& precision) {
        sp::Attention problem;
        auto& s = problem.shape;
        std::tie(s.batch, s.heads, s.tokens, s.width, s.tiles, s.tile_size, s.kept, s.pooled, s.prefix) = shape;
        problem.dtype = dtype(bfloat16);
        problem.scale = scale;
        problem.q = rows(q);
        problem.k = rows(k);
        problem.v = rows(v);
        problem.tile_tokens = pointer<const int32_t>(tile_tokens);
        problem.indices = pointer<const int32_t>(indices);
        problem.bias = pointer<const float>(bias);
        problem.tail_k = rows(tail_k);
        problem.tail_v = rows(tail_v);
        problem.tail_bias = pointer<const float>(tail_bias);
        problem.out = pointer<void>(out);
        problem.precision = precision_of(precision);
        sp::attend(problem, threads);
      },
      nb::arg("shape"), nb::arg("bfloat16"), nb::arg("scale"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
      nb::arg("tile_tokens"), nb::arg("indices"), nb::arg("bias"), nb::arg("tail_k"), nb::arg("tail_v"),
      nb::arg("tail_bias"), nb::arg("out"), nb::arg("threads"), nb::arg("precision") = "same", release());
  m.def(
      "topk",
      [](uintptr_t scores, bool bfloat16, int64_t count, int64_t columns, int64_t row_stride, int64_t k,
         uintptr_t indices, int64_t out_stride, int32_t offset, int threads) {
        sp::topk(pointer<const void>(scores), dtype(bfloat16), count, columns, row_stride, k, pointer<int32_t>(indices),
                 out_stride, offset, threads);
      },
      release());
  m.def(
      "tile_keys",
      [](const KeysShape& shape, bool bfloat16, float scale, bool sum, const RowsTuple& q, const RowsTuple& k,
         uintptr_t log2_weight, uintptr_t indices,
         int threads) { sp::tile_keys(tile_keys(shape, bfloat16, scale, sum, q, k, log2_weight, indices), threads); },
      release());
  m.def(
      "budget_keys",
      [](const KeysShape& shape, bool bfloat16, float scale, bool sum, const RowsTuple& q, const RowsTuple& k,
         uintptr_t log2_weight, int64_t least, int64_t total, uintptr_t bias, uintptr_t indices, int threads) {
        sp::budget_keys(
            {tile_keys(shape, bfloat16, scale, sum, q, k, log2_weight, indices), least, total, pointer<float>(bias)},
            threads);
      },
      release());
  m.def(
      "screened_keys",
      [](const KeysShape& shape, bool bfloat16, float scale, bool sum, const RowsTuple& q, const RowsTuple& k,
         uintptr_t log2_weight, const Grid& grid, int64_t num_blocks, uintptr_t indices, int threads) {
        sp::screened_keys(
            {tile_keys(shape, bfloat16, scale, sum, q, k, log2_weight, indices), block_grid(grid), num_blocks},
            threads);
      },
      release());
  m.def(
      "group_queries",
      [](const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& shape, bool bfloat16,
         const RowsTuple& q, uintptr_t tile_tokens, uintptr_t group_of, uintptr_t out, int threads) {
        sp::TileGroups p;
        std::tie(p.batch, p.heads, p.tokens, p.width, p.tiles, p.tile_size, p.groups, p.steps) = shape;
        p.dtype = dtype(bfloat16);
        p.q = rows(q);
        p.tile_tokens = pointer<const int32_t>(tile_tokens);
        p.group_of = pointer<const int32_t>(group_of);
        p.out = pointer<void>(out);
        sp::group_queries(p, threads);
      },
      release());
  m.def(
      "block_distances",
      [](const RowsTuple& x, bool bfloat16, int64_t batch, int64_t heads, int64_t width, const Grid& grid,
         uintptr_t out, int threads) {
        sp::block_distances(rows(x), dtype(bfloat16), batch, heads, width, block_grid(grid), pointer<float>(out),
                            threads);
      },
      release());
  m.def(
      "log_counts",
      [](uintptr_t indices, uintptr_t bias, int64_t count, int64_t kept, const Grid& grid, uintptr_t assignment,
         int64_t rows_per_head, uintptr_t counts, int threads) {
        sp::log_counts(pointer<const int32_t>(indices), pointer<const float>(bias), count, kept, block_grid(grid),
                       pointer<const int32_t>(assignment), rows_per_head, pointer<float>(counts), threads);
      },
      release());
  m.def(
      "pool_blocks",
      [](const RowsTuple& x, bool bfloat16, int64_t batch, int64_t heads, int64_t width, const Grid& grid,
         uintptr_t out, int threads) {
        sp::pool_blocks(rows(x), dtype(bfloat16), batch, heads, width, block_grid(grid), pointer<void>(out), threads);
      },
      release());
  m.def(
      "group_patches",
      [](const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape, bool bfloat16, const RowsTuple& x,
         const Grid& grid, uintptr_t assignment, uintptr_t mean, uintptr_t distance, int threads) {
        sp::PatchGroups p;
        std::tie(p.batch, p.heads, p.width, p.steps) = shape;
        p.dtype = dtype(bfloat16);
        p.x = rows(x);
        p.grid = block_grid(grid);
        p.assignment = pointer<int32_t>(assignment);
        p.mean = pointer<void>(mean);
        p.distance = pointer<float>(distance);
        sp::group_patches(p, threads);
      },
      release());
  m.def(
      "pool_groups",
      [](const RowsTuple& x, bool bfloat16, int64_t batch, int64_t heads, int64_t width, const Grid& grid,
         uintptr_t assignment, uintptr_t out, int threads) {
        sp::pool_groups(rows(x), dtype(bfloat16), batch, heads, width, block_grid(grid),
                        pointer<const int32_t>(assignment), pointer<void>(out), threads);
      },
      release());
}
