// Search of nested trellis codes, states in vector lanes. Included by one small file for each
// instruction set, which sets DROP_LANES (states in a vector) and is compiled with its own flags.
//
// Inputs (columns of W) are coded one after the other, all rows at once.
//   1. Error feedback, from the last input to the first, one error state a level: the target of
//      level P is u_P = w_j + sum_{i > j} e_P,i L_ij / L_jj, with H = L L^T and e_P = w - q_P. As all
//      rows share L_jj^2, what is left to minimise is sum_r weight_r sum_P lambda_P (u_P - q_P)^2.
//   2. Descent, in `sweeps` sweeps: other inputs fixed, u_P = w_j + sum_{i != j} e_P,i H_ij / H_jj,
//      and an input keeps its codes unless that sum falls.
// The planes of an input follow each other, lowest first. For plane m, whose later planes are not
// known, a later level counts with the share of its error that they will leave, 4^-bits: the sum is
// A (x - c)^2 up to a constant, x the mean of u_P less the sum of the earlier planes. A Viterbi pass
// finds the exact optimum (segments.h, viterbi.h). A second turn with the later planes known changed
// not one code under any H that was tried; twice or half the share raised J by .4 to 1.4 %.
//
// Outputs with a metric of their own (`row_feedback`, YAQA's output side, arXiv 2505.22988): as the form is
// H_O (x) H, the targets between inputs are as above, and what H_O couples lies within an input: with
// e_P = u_P - q_P there, e^T H_O e = sum_b (e_b + sum_{a < b} F_ab^T e_a)^T D_b (...). So blocks of rows
// are coded one after the other, all planes of a block, for targets that hold the errors of the blocks
// before it; those of the rows behind it, which a path sees too, know of them at the next block.
//
// The sums over i run in blocks of inputs: what the inputs after a block contribute is one product,
// the rest follows input by input. Rows lie in lanes, and every row's sum runs in the same order
// whatever the lanes and the number of threads; so results are equal where the compiler may fuse a
// product and a sum (AVX2 and better, AArch64), and elsewhere differ by rounding.
#pragma once

#include <memory>

#include "segments.h"

namespace drop {
namespace {

constexpr int64_t kBlock = 32;  // inputs
constexpr int64_t kTile = 32;   // rows of a worker's share: whole bytes of every stream
constexpr int64_t kShortest = 3;  // bytes of a stream

struct Scratch {
  std::vector<Line> tables, metrics;
  std::vector<float> x;  // [padded]
};

// How the levels pull on plane m: x = sum_l pull[l] u_l less the sum of the earlier planes.
struct Blend {
  Blend(const Problem& p, int m) {
    float total = 0;
    for (int l = 0, i = m + 1, bits = 0; l < p.levels; l++) {
      for (; i < p.prefix[l]; i++) bits += p.plane[i].bits;
      pull[l] = p.prefix[l] > m ? p.lambda[l] * std::pow(4.0f, float(-bits)) : 0;
      total += pull[l];
    }
    for (int l = 0; l < p.levels; l++) pull[l] /= total;
  }
  float pull[kMaxPlanes];
};

class Search {
 public:
  Search(const Problem& p, int threads)
      : p_(p),
        padded_((std::max<int64_t>(p.d_out, kTile) + 2 * kTile) / kTile * kTile),
        w_(p.d_in * padded_, 0),
        error_(p.levels * p.d_in * padded_),
        base_(p.levels * kBlock * padded_),
        target_(p.levels * padded_),
        left_(p.row_feedback ? p.levels * padded_ : 0),
        coefficients_(p.d_in * kBlock),
        costs_(2 * padded_ / kTile),
        scratch_(threads) {
    int64_t metrics = 0, tables = 0;
    for (int m = 0; m < p.planes; m++) {
      const int64_t bytes = std::max<int64_t>((p.plane[m].bits * p.d_out + 7) / 8, kShortest);
      planes_.push_back(std::make_unique<PlaneSearch>(p, m, bytes, padded_));
      metrics = std::max(metrics, int64_t(planes_[m]->plan.vectors) * N);
      tables = std::max(tables, planes_[m]->table_size());
      codes_bytes_[m] = bytes;
      blends_.emplace_back(p, m);
    }
    for (Scratch& s : scratch_) {
      s.metrics.resize(metrics * 2 / sizeof(Line) + 1);
      s.tables.resize(tables * 2 / sizeof(Line));
      s.x.resize(padded_);
    }
    for (int64_t j = 0; j < p.d_in; j++)
      std::copy(p.w + j * p.d_out, p.w + (j + 1) * p.d_out, &w_[j * padded_]);
  }

  // Workers that find work: a matrix of one segment is faster alone than with others waiting.
  int workers() const {
    if (p_.row_feedback) return 1;  // blocks take turns
    size_t most = 1;
    for (const auto& plane : planes_) most = std::max(most, plane->segments.size());
    return int(std::min(most, scratch_.size()));
  }

  void run(const Worker& worker) {
    const Range tiles = share(padded_ / kTile, worker);
    const Range mine{tiles.first * kTile, tiles.last * kTile};
    if (p_.lower) {
      for (int64_t last = p_.d_in; last > 0; last -= kBlock)
        run_block(worker, mine, std::max<int64_t>(0, last - kBlock), last, false, nullptr);
    } else {
      for (int64_t j = 0; j < p_.d_in; j++) {
        read_codes(j, mine);
        set_error(j, mine);
      }
    }
    for (int s = 0; s < p_.sweeps; s++) {
      int64_t changed = 0;
      for (int64_t last = p_.d_in; last > 0; last -= kBlock)
        run_block(worker, mine, std::max<int64_t>(0, last - kBlock), last, true, &changed);
      if (worker.rank == 0) p_.changed[s] = changed;
    }
  }

 private:
  float* error(int l, int64_t j) { return &error_[(l * p_.d_in + j) * padded_]; }
  float* value(int m) { return planes_[m]->values.data(); }
  float* target(int l) { return &target_[l * padded_]; }

  // Inputs first <= j < last, the last of them first.
  void run_block(const Worker& worker, Range mine, int64_t first, int64_t last, bool descent,
                 int64_t* changed) {
    const float* metric = descent ? p_.h : p_.lower;
    const Range inputs = share(p_.d_in, worker);
    for (int64_t i = inputs.first; i < inputs.last; i++)
      for (int64_t c = 0; c < kBlock; c++) {
        const int64_t j = std::min(first + c, last - 1);
        coefficients_[i * kBlock + c] = metric[i * p_.d_in + j] / metric[j * p_.d_in + j];
      }
    worker.barrier();
    for (int l = 0; l < p_.levels; l++)
      for (int64_t c = 0; first + c < last; c += 8)
        add_outside(l, c, {descent ? 0 : last, descent ? first : last}, {last, p_.d_in}, mine);
    for (int64_t j = last - 1; j >= first; j--) {
      for (int l = 0; l < p_.levels; l++) set_target(l, j, first, last, descent, mine);
      if (descent) {
        read_codes(j, mine);
        set_costs(0, mine);
      }
      worker.barrier();
      if (p_.row_feedback) {
        for (size_t b = 0; b < planes_[0]->segments.size(); b++) search_rows(b);
      } else {
        for (int m = 0; m < p_.planes; m++) search_plane(worker, m);
      }
      if (descent && !improved(worker, mine)) continue;
      if (descent) ++*changed;
      write_codes(j, mine);
      set_error(j, mine);
    }
    worker.barrier();  // coefficients are read until here
  }

  // base[l][c..c+8) += sum over two ranges of inputs of error[l][i] coefficients[i][c..c+8).
  void add_outside(int l, int64_t c, Range one, Range two, Range rows) {
    for (int64_t r = rows.first; r < rows.last; r += 2 * R) {
      vf sum[8][2] = {};
      for (const Range& inputs : {one, two})
        for (int64_t i = inputs.first; i < inputs.last; i++) {
          const float* e = error(l, i) + r;
          const float* a = &coefficients_[i * kBlock + c];
          const vf e0 = load<vf>(e), e1 = load<vf>(e + R);
#pragma GCC unroll 8
          for (int u = 0; u < 8; u++) {
            sum[u][0] += e0 * a[u];
            sum[u][1] += e1 * a[u];
          }
        }
      for (int u = 0; u < 8; u++) {
        float* to = &base_[(l * kBlock + c + u) * padded_ + r];
        store(to, sum[u][0]);
        store(to + R, sum[u][1]);
      }
    }
  }

  // target[l] of input j: its weights, what is outside of its block and what is inside.
  void set_target(int l, int64_t j, int64_t first, int64_t last, bool descent, Range rows) {
    for (int64_t r = rows.first; r < rows.last; r += R) {
      vf sum = load<vf>(&base_[(l * kBlock + j - first) * padded_ + r]);
      for (int64_t i = descent ? first : j + 1; i < last; i++)
        if (i != j) sum += load<vf>(error(l, i) + r) * coefficients_[i * kBlock + j - first];
      store(target(l) + r, sum + load<vf>(&w_[j * padded_ + r]));
    }
  }

  // The codes of plane m given the earlier ones. All workers; ends with its values set.
  void search_plane(const Worker& worker, int m) {
    PlaneSearch& plane = *planes_[m];
    Scratch& mine = scratch_[worker.rank];
    int16_t *tables = (int16_t*)mine.tables.data(), *metrics = (int16_t*)mine.metrics.data();
    for (size_t i = worker.rank; i < plane.segments.size(); i += worker.size) {
      const Segment& s = plane.segments[i];
      set_blend(m, std::max<int64_t>(s.warm, 0), s.last, mine.x.data());
      if (s.warm < 0)
        set_blend(m, std::max<int64_t>(plane.ring + s.warm, 0), plane.ring, mine.x.data());
      plane.search(i, mine.x.data(), tables, metrics);
    }
    worker.barrier();
    if (worker.rank == 0) plane.join(mine.x.data(), tables, metrics);
    worker.barrier();
  }

  // Block b of an input's rows, at all planes.
  void search_rows(size_t b) {
    Scratch& mine = scratch_[0];
    int16_t *tables = (int16_t*)mine.tables.data(), *metrics = (int16_t*)mine.metrics.data();
    const Segment& widest = planes_[0]->segments[b];
    const int64_t first = widest.first, last = std::min(widest.last, p_.d_out);
    if (b == 0) given_ = target_;
    for (int l = 0; b && l < p_.levels; l++) feed_back(l, first, std::min(widest.seen, p_.d_out));
    for (int m = 0; m < p_.planes; m++) {
      PlaneSearch& plane = *planes_[m];
      const Segment& s = plane.segments[b];
      set_blend(m, first, s.seen, mine.x.data());
      if (b == 0) set_blend(m, plane.ring + s.warm, plane.ring, mine.x.data());
      plane.follow(b, mine.x.data(), tables, metrics);
    }
    for (int l = 0; l < p_.levels; l++) {
      float* e = &left_[l * padded_];
      std::copy(&given_[l * padded_ + first], &given_[l * padded_ + last], e + first);
      for (int i = 0; i < p_.prefix[l]; i++)
        for (int64_t r = first; r < last; r++) e[r] -= value(i)[r];
    }
  }

  // target(l) of rows first <= r < last, with the errors of all rows before them.
  void feed_back(int l, int64_t first, int64_t last) {
    float* u = target(l);
    std::copy(&given_[l * padded_ + first], &given_[l * padded_ + last], u + first);
    for (int64_t i = 0; i < first; i++) {
      const float e = left_[l * padded_ + i], *row = p_.row_feedback + i * p_.d_out;
      for (int64_t r = first; r < last; r++) u[r] += e * row[r];
    }
  }

  // Targets of plane m for rows first <= r < last.
  void set_blend(int m, int64_t first, int64_t last, float* x) {
    std::fill(x + first, x + last, 0.0f);
    for (int l = 0; l < p_.levels; l++) {
      const float a = blends_[m].pull[l];
      const float* u = target(l);
      for (int64_t r = first; a != 0 && r < last; r++) x[r] += a * u[r];
    }
    for (int i = 0; i < m; i++) {
      const float* c = value(i);
      for (int64_t r = first; r < last; r++) x[r] -= c[r];
    }
  }

  // Cost of the values for the targets, summed in tiles: before (0) or after (1) the search.
  void set_costs(int when, Range rows) {
    for (int64_t t = rows.first / kTile; t < rows.last / kTile; t++) {
      double sum = 0;
      for (int64_t r = t * kTile; r < std::min((t + 1) * kTile, p_.d_out); r++) {
        float q = 0;
        for (int l = 0, i = 0; l < p_.levels; l++) {
          for (; i < p_.prefix[l]; i++) q += value(i)[r];
          const float left = target(l)[r] - q;
          sum += double(p_.row_weights[r]) * p_.lambda[l] * left * left;
        }
      }
      costs_[2 * t + when] = sum;
    }
  }

  bool improved(const Worker& worker, Range mine) {
    set_costs(1, mine);
    worker.barrier();
    double before = 0, after = 0;
    for (size_t t = 0; t < costs_.size(); t += 2) {
      before += costs_[t];
      after += costs_[t + 1];
    }
    worker.barrier();
    return after < before * (1 - 1e-9);
  }

  void set_error(int64_t j, Range rows) {
    for (int l = 0; l < p_.levels; l++) {
      float* e = error(l, j);
      const int from = l ? p_.prefix[l - 1] : 0;
      const float* start = l ? error(l - 1, j) : &w_[j * padded_];
      std::copy(start + rows.first, start + rows.last, e + rows.first);
      for (int i = from; i < p_.prefix[l]; i++)
        for (int64_t r = rows.first; r < rows.last; r++) e[r] -= value(i)[r];
      // Rows that do not exist have no error.
      for (int64_t r = std::max(rows.first, p_.d_out); r < rows.last; r++) e[r] = 0;
    }
  }

  void write_codes(int64_t j, Range rows) {
    for (int m = 0; m < p_.planes; m++) {
      const Plan& plan = planes_[m]->plan;
      uint8_t* codes = p_.codes[m] + j * codes_bytes_[m];
      for (int64_t r = rows.first; r < std::min(rows.last, planes_[m]->ring); r++) {
        const int bit = int(plan.k * r % 8);
        uint8_t& byte = codes[plan.k * r / 8];
        const int newest = plan.newest(int(r % plan.cycle), planes_[m]->states[r]) << bit;
        byte = uint8_t((bit ? byte : 0) | newest);
      }
    }
  }

  // Values of the codes of input j; the window of a row begins in rows of other workers.
  void read_codes(int64_t j, Range rows) {
    for (int m = 0; m < p_.planes; m++) {
      const Plan& plan = planes_[m]->plan;
      const int64_t ring = planes_[m]->ring;
      const uint8_t* codes = p_.codes[m] + j * codes_bytes_[m];
      const int mask = (1 << plan.k) - 1;
      int state = 0;
      for (int64_t r = rows.first - 2 * plan.cycle; r < std::min(rows.last, ring); r++) {
        const int64_t row = (r + 2 * ring) % ring;
        const int step = int((r + 2 * plan.cycle) % plan.cycle);
        const int newest = codes[plan.k * row / 8] >> plan.k * row % 8 & mask;
        state = (state & ~(mask << plan.k * step)) | newest << plan.k * step;
        if (r >= rows.first) value(m)[r] = plan.values[plan.label(step, state)];
      }
    }
  }

  const Problem& p_;
  const int64_t padded_;
  std::vector<float> w_, error_, base_, target_, given_, left_, coefficients_;
  std::vector<double> costs_;
  std::vector<Scratch> scratch_;
  std::vector<std::unique_ptr<PlaneSearch>> planes_;
  std::vector<Blend> blends_;
  int64_t codes_bytes_[kMaxPlanes];
};

void search_matrix(const Problem& p, int threads) {
  Search search(p, std::max(threads, 1));
  auto body = [&](const Worker& worker) { search.run(worker); };
  on_threads(search.workers(), body);
}

}  // namespace
}  // namespace drop
