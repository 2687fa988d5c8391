// The kernels of an AMX level: bfloat16 in tiles, float32 in vectors. Included last inside the anonymous
// namespaces of the AMX levels, which define before: Float (vectors of 16 float32), Pairs (the same with
// pairs of bfloat16), Tiles (see amx_kernel.h) and Compressor (see topk_kernel.h).

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Float, Mode::plain>(task, memory);
  else
    attend_in_tiles<Pairs, Tiles>(task, memory);
}

std::size_t attend_bytes(const TileTask& task) {
  return task.dtype == DType::float32 ? attend_scratch(task) : attend_scratch_in_tiles(task);
}

int key_words(DType dtype, int width) { return dtype == DType::bfloat16 ? tile_words(width) : width; }

void pack_keys(const void* const* rows, DType dtype, int count, int width, void* packed) {
  if (dtype == DType::float32)
    pack_keys_as<Float, Mode::plain>(rows, count, width, packed);
  else
    pack_keys_in_tiles<Pairs>(rows, count, width, packed);
}

bool score(const ScoreTask& task, void* memory) {
  if (task.dtype == DType::float32) return score_tiles<Float, Mode::plain, Compressor>(task, memory);
  return score_in_tiles<Pairs, Tiles, Compressor>(task, memory);
}

std::size_t score_bytes(const ScoreTask& task) {
  return task.dtype == DType::float32 ? score_scratch<Float>(task) : score_scratch_in_tiles<Pairs>(task);
}

constexpr Kernels level_kernels = {
    attend_bytes, attend, select_topk<Compressor>, add_rows, store_row, kKeyBlock<Float>, key_words, pack_keys, score_bytes, score, group_tile, distances,
};
