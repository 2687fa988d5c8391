// The kernels of an AMX level: all but float32 attention and chosen blocks of keys in tiles. Included last inside
// the anonymous namespaces of the AMX levels, which define before: Float (vectors of 16 float32), Pairs (the same
// with pairs of bfloat16), Tiles (see amx_kernel.h) and Compressor (see topk_kernel.h).

void attend(const TileTask& task, void* memory) {
  if (task.dtype == DType::float32)
    attend_tile<Float, Mode::plain>(task, memory);
  else
    attend_in_tiles<Pairs, Tiles>(task, memory);
}

std::size_t attend_bytes(const TileTask& task) {
  return task.dtype == DType::float32 ? attend_scratch(task) : attend_scratch_in_tiles(task);
}

int key_words(DType, int width) { return tile_words(width); }

constexpr Kernels level_kernels = {
    attend_bytes,
    attend,
    select_topk<Compressor>,
    add_rows,
    store_row,
    kKeyBlock<Float>,
    kTileSide,
    key_words,
    pack_keys_in_tiles<Pairs>,
    score_scratch_in_tiles<Pairs>,
    score_in_tiles<Pairs, Tiles, Compressor>,
    quad_words<Mode::dot>,
    pack_quad<Mode::dot>,
    score_quads_scratch<Pairs>,
    score_quads<Pairs, Mode::dot, Compressor>,
    group_scratch<Float>,
    group_tile<Float>,
    nearest_scratch<Float>,
    nearest<Float>,
    half_square,
    distances,
};
