// Packed codes: one layout for every instruction set.
//
// A plane is the matrix of codes of one codebook, uint8 [rows, groups]. Canonically it is row
// major. Packed, it is ordered so that a vector register holds the same group of many rows, and so
// that one pass over the plane is one sequential read:
//
//     for block b of kBlock groups               (the tables of a block stay in the first cache)
//       for tile t of kTile rows                 (the last tile has the strips that are left)
//         for group j of the block
//           for strip s of the tile: 64 bytes    (one code each of kStrip rows)
//
// Rows are padded to whole strips and never further, so 576 rows cost 576 bytes a group. Inside a
// strip, byte 2i is row i and byte 2i + 1 is row 32 + i: sums taken over the even and over the odd
// bytes of a register as 16-bit lanes then come out in row order.
//
// A block is also the span over which table entries are summed as integers before the sum is
// scaled and added in float32 (table.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace drop {

constexpr int kGroup = 8;                      // weights per code
constexpr int kEntries = 256;                  // entries of a codebook
constexpr int kHalf = kEntries / 2;            // stored entries of a sign-symmetric one
constexpr int kMostPlanes = 64;
constexpr int64_t kStrip = 64;                 // rows per strip
constexpr int64_t kTileStrips = 4;             // strips per full tile
constexpr int64_t kTile = kStrip * kTileStrips;
constexpr int64_t kBlock = 128;                // groups per block

static inline int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Where one strip of one block starts, and how far apart its groups are.
struct StripView {
  int64_t offset;  // bytes from the start of the plane to (block, group 0, strip)
  int64_t stride;  // bytes from one group to the next
};

struct PlaneShape {
  int64_t rows, groups;

  int64_t padded_rows() const { return round_up(rows, kStrip); }
  int64_t strips() const { return padded_rows() / kStrip; }
  int64_t blocks() const { return (groups + kBlock - 1) / kBlock; }
  int64_t bytes() const { return padded_rows() * groups; }
  int64_t block_groups(int64_t block) const {
    const int64_t left = groups - block * kBlock;
    return left < kBlock ? left : kBlock;
  }
  StripView strip(int64_t block, int64_t strip) const {
    const int64_t tile = strip / kTileStrips;
    const int64_t height = padded_rows() - tile * kTile;
    return {block * kBlock * padded_rows() + tile * kTile * block_groups(block) +
                strip % kTileStrips * kStrip,
            height < kTile ? height : kTile};
  }
};

// Byte of a row (0 .. kStrip - 1) inside its strip.
static inline int64_t row_byte(int64_t row) { return row < 32 ? 2 * row : 2 * (row - 32) + 1; }

}  // namespace drop
