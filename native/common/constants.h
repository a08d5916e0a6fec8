// The shape of a code, and the letters that all of native/ shares with the Python side:
//
//   n            activation rows (samples) of a call
//   d_in, d_out  inputs and outputs of a matrix
//   g, G         inputs of a group, and groups of a row: G = d_in / g
//   M            codebooks, each with its plane of codes
//   K            entries of a codebook; a sign-symmetric one stores K / 2
//   P            prefix: how many of the M codebooks a model, or a call, uses
#pragma once

#include <cstdint>

namespace drop {

constexpr int kGroup = 8;            // g
constexpr int kEntries = 256;        // K
constexpr int kHalf = kEntries / 2;  // entries that a sign-symmetric codebook stores

}  // namespace drop
