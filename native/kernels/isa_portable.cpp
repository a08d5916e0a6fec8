// Portable C++: the reference of all kernels, and the fall-back where no other fits.
// A LUT holds one 16-bit word for each of the 256 codes, signs expanded.
#define DROP_ISA portable
#include "scalar.h"

namespace drop {
namespace portable {

// Squared norms of groups of 8 int16.
DROP_INLINE void squared_norms(const int16_t* x, int64_t count, int32_t* norms) {
  for (int64_t j = 0; j < count; ++j) {
    norms[j] = 0;
    for (int i = 0; i < kGroup; ++i) norms[j] += x[j * kGroup + i] * x[j * kGroup + i];
  }
}

}  // namespace portable
}  // namespace drop

#include "lut.h"
#include "trellis_portable.h"

namespace drop {
namespace portable {

template <int kLutBits>
struct Words {
  static constexpr int kBits = kLutBits;
  static constexpr int64_t kGroupBytes[2] = {kEntries * 2, kEntries * 2};

  // The whole fits (lut.h chooses the factor of x so), the sum of some pairs need not: it wraps, as
  // in registers.
  static int32_t dot(const int16_t* x, const Codebook& codebook, int k) {
    uint32_t sum = 0;
    for (int p = 0; p < 4; ++p) {
      const int16_t* pair = codebook.pairs() + (p * codebook.entries + k) * 2;
      sum += static_cast<uint32_t>(x[2 * p] * pair[0] + x[2 * p + 1] * pair[1]);
    }
    return static_cast<int32_t>(sum);
  }

  static int32_t group_max(const int16_t* x, const Codebook& codebook) {
    int32_t most = 0;
    for (int k = 0; k < codebook.entries; ++k) {
      int32_t value = dot(x, codebook, k);
      value = value < 0 ? -value : value;
      most = value > most ? value : most;
    }
    return most;
  }

  static void group_lut(const int16_t* x, const Codebook& codebook, uint8_t* out) {
    uint16_t lut[kEntries];
    for (int k = 0; k < codebook.entries; ++k) {
      lut[k] = static_cast<uint16_t>(((1 << 30) + dot(x, codebook, k)) >> (31 - kBits));
    }
    if (codebook.entries == kHalf) {
      for (int k = 0; k < kHalf; ++k) {
        lut[kHalf + k] = static_cast<uint16_t>((1 << kBits) - 1 - lut[k]);
      }
    }
    memcpy(out, lut, sizeof lut);
  }

  static void block(bool, int64_t strips, const Tile& tile) {
    const int32_t offset = static_cast<int32_t>(tile.count) * ((1 << kBits) - 1);
    for (int64_t s = 0; s < strips; ++s) {
      int32_t totals[kStrip] = {};
      for (int64_t j = 0; j < tile.count; ++j) {
        const uint16_t* lut = reinterpret_cast<const uint16_t*>(tile.lut) + j * kEntries;
        const uint8_t* row = tile.codes + (s * tile.count + j) * kStrip;
        for (int64_t i = 0; i < kStrip; ++i) totals[i] += lut[row[i]];
      }
      for (int64_t i = 0; i < kStrip; ++i) {
        tile.sums[s * kStrip + i] +=
            static_cast<float>(2 * totals[row_byte(i)] - offset) * tile.half_step;
      }
    }
  }
};

typedef Nibbles<OneByte> Planes;

}  // namespace portable

extern const Kernel portable_kernel;
extern const Kernel portable_u8_kernel;
constexpr Kernel portable_kernel = portable::make_kernel<portable::Words<14>, portable::Planes>(
    "portable", "plain C++, 14-bit tables");
constexpr Kernel portable_u8_kernel = portable::make_kernel<portable::Words<8>, portable::Planes>(
    "portable-u8", "plain C++, 8-bit tables");
}  // namespace drop
