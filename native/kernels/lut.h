// Building look-up tables (LUTs), and walking a packed plane with them. Included once per
// instruction set, inside its own namespace; the instruction set supplies the few vector routines
// named below and nothing else.
//
// An entry of a LUT is the dot product of one group of 8 activations with one codebook entry, as an
// unsigned integer v of kBits bits, standing for (v - V / 2) * step with V = 2^kBits - 1. Negation
// is V - v, a bitwise complement, hence a sign-symmetric codebook needs half the entries and the
// sign of a code costs one masked subtraction.
//
// Steps, for one block of at most kBlock groups (one unit):
//   1. T = max |x . c| over the block. Exact, but only groups whose norm bound |x| max |c| exceeds
//      the maximum so far are evaluated: about a fifth on Gaussian inputs.
//   2. x -> int16 with the factor a for which a * scale * T is just under 2^30.
//   3. v = (2^30 + xq . cq) >> (31 - kBits): one multiply-add per pair of coordinates, and the
//      rounding offset is the accumulator's first value.
// The sum S of n entries is exact in integers; it returns to float32 once a block, as
// (2 S - n V) * step / 2, added in plane order, then block order. All instruction sets compute the
// same integers and the same float operations, so they agree bit for bit, as do all numbers of
// rows and threads.
//
// Error of an entry: at most step / 2 = T / V, plus 2^-15 relative from the int16 activations. One
// step a block and plane keeps an outlier's harm inside its block. Inputs below 1e-25 count as 0;
// a block with an infinity or NaN gives NaN.
#pragma once

#include "block.h"
#include "common/cpu_features.h"
#include "decode.h"
#include "int8_rows.h"
#include "rotate.h"
#include "trellis_product.h"

namespace drop {
namespace DROP_ISA {

constexpr int kBits16 = 14;  // "16-bit" LUTs: two base-128 digits, or one 16-bit word
constexpr int kBits8 = 8;

// Step 1, on activations rounded to 13 bits: an upper bound of max |x . c|, at most 2^-10 above it.
// `rounded` is scratch. Of the instruction set: squared_norms (a multiple of 4 groups), and
// Isa::group_max, max |xq . cq| over the entries of a codebook.
template <typename Isa>
static float block_reach(const float* x, int64_t count, float largest, const Codebook& codebook,
                         int16_t* rounded) {
  const float factor = 4095.0f / largest;
  quantize(x, count * kGroup, factor, rounded);
  int32_t norms[kBlock];
  for (int64_t i = count * kGroup; i < round_up(count, 4) * kGroup; ++i) rounded[i] = 0;
  squared_norms(rounded, round_up(count, 4), norms);
  int32_t top = -1;
  int64_t best = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (norms[j] > top) {
      top = norms[j];
      best = j;
    }
  }
  int32_t reach = 0, enough = -1;  // groups of at most `enough` cannot exceed `reach`
  for (int64_t j = best;; ++j) {
    if (norms[j] > enough) {
      const int32_t here = Isa::group_max(rounded + j * kGroup, codebook);
      if (here > reach) {
        reach = here;
        const float ratio = static_cast<float>(reach) / codebook.norm;
        enough = static_cast<int32_t>(ratio * ratio);
      }
    }
    if (j + 1 == count) j = -1;
    if (j + 1 == best) break;
  }
  // Rounding moves xq . cq by at most 4 * 32767.
  return (static_cast<float>(reach) + 131072.0f) / (factor * codebook.scale);
}

// Lines prefetched while one group's LUT is built: about what memory delivers in that time.
constexpr int64_t kLinesPerGroup = 6;

DROP_INLINE void prefetch(Upcoming& soon, int64_t lines) {
  for (; lines > 0 && soon.at < soon.count; --lines) {
    const Upcoming::Part& part = soon.parts[soon.at];
    __builtin_prefetch(part.data + soon.offset, 0, 2);
    soon.offset += 64;
    if (soon.offset >= part.bytes) {
      soon.offset = 0;
      ++soon.at;
    }
  }
}

template <typename Isa>
static void build_lut(const BuildLutJob& job, int64_t first, int64_t last) {
  const LutShape& shape = job.shape;
  const int64_t blocks = shape.blocks();
  alignas(64) int16_t rounded[kBlock * kGroup];
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t block = unit % blocks, plane = unit / blocks % shape.prefix;
    const int64_t row = unit / blocks / shape.prefix, start = block * kBlock;
    if (job.prefixes && plane >= job.prefixes[row]) continue;
    const int64_t count = shape.groups - start < kBlock ? shape.groups - start : kBlock;
    const float* x = job.x + row * job.x_stride + start * kGroup;
    const Codebook& codebook = *job.codebooks[plane];
    uint8_t* lut = job.lut + row * shape.bytes();
    float* half_step =
        reinterpret_cast<float*>(lut + shape.steps_offset()) + plane * blocks + block;
    lut += (plane * shape.groups + start) * shape.group_bytes;

    uint32_t bits = 0;  // of the largest |x|; integer order is float order, NaN above all
    for (int64_t i = 0; i < count * kGroup; ++i) {
      uint32_t here;
      memcpy(&here, x + i, 4);
      here &= 0x7fffffff;
      bits = here > bits ? here : bits;
    }
    float largest, factor = 0;
    memcpy(&largest, &bits, 4);
    if (bits >= 0x7f800000) {
      bits = 0x7fc00000;
      memcpy(half_step, &bits, 4);
    } else if (largest < 1e-25f || codebook.largest == 0) {
      *half_step = 0;
    } else {
      const float reach = block_reach<Isa>(x, count, largest, codebook, rounded);
      factor = 1073479680.0f / (codebook.scale * reach);  // 2^30 - 2^18
      if (factor * largest > 32767.0f) factor = 32767.0f / largest;
      *half_step = static_cast<float>(1 << (30 - Isa::kBits)) / (factor * codebook.scale);
    }
    if (factor == 0) {
      memset(rounded, 0, sizeof rounded);
    } else {
      quantize(x, count * kGroup, factor, rounded);
    }
    for (int64_t j = 0; j < count; ++j) {
      if (job.upcoming) prefetch(*job.upcoming, kLinesPerGroup);
      Isa::group_lut(rounded + j * kGroup, codebook, lut + j * shape.group_bytes);
    }
  }
}

// One tile of one block, as the instruction set sees it.
struct Tile {
  const uint8_t* codes;  // of the first strip; strips are count * kStrip bytes apart
  const uint8_t* next;   // the tile that will be read after this one, for prefetching
  int64_t count;         // groups
  const uint8_t* lut;    // of the block
  float half_step;
  float* sums;  // [strips * kStrip]: added to

  // Strips `skip` .. of a tile of `strips`, when `width` of them are walked at a time.
  Tile part(int64_t skip, int64_t width, int64_t strips) const {
    Tile tile = *this;
    tile.codes += skip * count * kStrip;
    tile.sums += skip * kStrip;
    if (skip + width < strips) tile.next = tile.codes + width * count * kStrip;
    return tile;
  }
};

// Where to prefetch while group j is being read, kAhead groups ahead in the order of reading.
template <int64_t kAhead>
DROP_INLINE const uint8_t* ahead(const Tile& tile, int64_t j) {
  const int64_t left = j + kAhead - tile.count;
  return left < 0 ? tile.codes + (j + kAhead) * kStrip : tile.next + left * kStrip;
}

// Strips first .. last of one matrix, for all n activation rows. Isa::block is one tile.
template <typename Isa>
static void lut_gemv(const LutGemvJob& job, int64_t first, int64_t last) {
  const int64_t rows = (last - first) * kStrip;
  for (int64_t i = 0; i < job.n; ++i) {
    memset(job.sums + i * job.sums_stride, 0, static_cast<size_t>(rows) * 4);
  }
  const int64_t blocks = job.plane.blocks();
  for (int64_t m = 0; m < job.lut_shape.prefix; ++m) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t count = job.plane.block_groups(block);
      const int64_t offset =
          (m * job.lut_shape.groups + block * kBlock) * job.lut_shape.group_bytes;
      const int64_t step = job.lut_shape.steps_offset() + (m * blocks + block) * 4;
      for (int64_t strip = first; strip < last;) {
        const int64_t strips = last - strip < kTileStrips ? last - strip : kTileStrips;
        Tile tile;
        tile.codes = job.planes[m] + job.plane.offset(block, strip);
        tile.count = count;
        tile.next = tile.codes;
        if (strip + strips < last) {
          tile.next = job.planes[m] + job.plane.offset(block, strip + strips);
        } else if (block + 1 < blocks) {
          tile.next = job.planes[m] + job.plane.offset(block + 1, first);
        } else if (m + 1 < job.lut_shape.prefix) {
          tile.next = job.planes[m + 1] + job.plane.offset(0, first);
        }
        for (int64_t i = 0; i < job.n; ++i) {
          if (job.prefixes && m >= job.prefixes[i]) continue;
          const uint8_t* lut = job.lut + i * job.lut_shape.bytes();
          tile.lut = lut + offset;
          memcpy(&tile.half_step, lut + step, 4);
          tile.sums = job.sums + i * job.sums_stride + (strip - first) * kStrip;
          Isa::block(job.symmetric, strips, tile);
        }
        strip += strips;
      }
    }
  }
}

// Adapts T::tile<symmetric, strips> to a number of strips known at run time.
template <typename T>
struct Tiled : T {
  template <bool kSymmetric>
  static void any(int64_t strips, const Tile& tile) {
    switch (strips) {
      case 1: return T::template tile<kSymmetric, 1>(tile);
      case 2: return T::template tile<kSymmetric, 2>(tile);
      case 3: return T::template tile<kSymmetric, 3>(tile);
      default: return T::template tile<kSymmetric, 4>(tile);
    }
  }
  static void block(bool symmetric, int64_t strips, const Tile& tile) {
    symmetric ? any<true>(strips, tile) : any<false>(strips, tile);
  }
};

// One line of the list of kernels: look-up tables by Isa, trellis planes by Planes. A constant
// expression: nothing that was compiled for an instruction set may run before the processor is
// known to have it.
template <typename Isa, typename Planes>
constexpr Kernel make_kernel(const char* name, const char* summary) {
  return {name,
          summary,
          Isa::kGroupBytes[0],
          Isa::kGroupBytes[1],
          kCompiledFeatures,
          build_lut<Isa>,
          lut_gemv<Isa>,
          epilogue,
          decode,
          trellis_input,
          trellis_gemv<Planes>,
          trellis_decode<Planes>,
          rotate,
          quantize_row,
          int8_rows,
          norm,
          apply_rope,
          store,
          attention,
          silu_mul,
          stream};
}

}  // namespace DROP_ISA
}  // namespace drop
