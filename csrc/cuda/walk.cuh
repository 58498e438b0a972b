// The way of a block through the tiles, and in each through the terms and the rank.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/table.h"

namespace portllm::cuda {

// A tile, and where it lies.
struct Tile {
  int index = 0;
  int weight = 0;
  int row = 0;
  int col = 0;

  PORTLLM_DEVICE bool valid(const Table& table) const { return index < table.n_tiles; }

  // Finds the place of an index that has grown.
  PORTLLM_DEVICE void locate(const Table& table) {
    // Most often it is this weight or the next; else log2(n_weights) steps find it.
    if (index >= table.weights[weight].end_tile) {
      int low = weight + 1, high = table.n_weights - 1;
      if (index < table.weights[low].end_tile) high = low;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (index < table.weights[middle].end_tile) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      weight = low;
    }
    const Weight& w = table.weights[weight];
    const int tiles_n = (w.n - 1) / kTileCols + 1, local = index - w.first_tile;
    // The reciprocal is rounded down, so this may be one too small.
    int tile_row = static_cast<int>(multiply_high(local, w.reciprocal));
    int tile_col = local - tile_row * tiles_n;
    if (tile_col >= tiles_n) {
      ++tile_row;
      tile_col -= tiles_n;
    }
    row = tile_row * kTileRows;
    col = tile_col * kTileCols;
  }
};

// A step of the multiplication: of a tile, a term, and of that 16 of the rank.
struct Step : Tile {
  int term = 0;
  int k = 0;
  bool opens_tile = true;

  PORTLLM_DEVICE void start(const Table& table, int tile) {
    index = tile;
    if (!valid(table)) return;
    locate(table);
    term = table.weights[weight].first_term;
    k = 0;
    opens_tile = true;
  }

  PORTLLM_DEVICE void advance(const Table& table) {
    opens_tile = false;
    k += kTileRank;
    if (k < table.terms[term].rank) return;
    k = 0;
    ++term;
    const Weight& w = table.weights[weight];
    if (term == w.first_term + w.n_terms) start(table, index + block_count());
  }
};

}  // namespace portllm::cuda
