// All experts on a CPU: one expert at a time on each thread, its rows staying in the cache.
//
// Letters: T tokens, N assignments sorted by expert, D model width, E experts, F expert width, H width of the first
// product (2F when gated, the gate half first; else F), n rows of one expert. See native.py, which compiles this.
//
// Four dtypes: that of the tensors; `compute`, that of the matrix products, which the caller passes x and the gradient
// of y in; `stored`, or S, what the loops over elements read and write, which is `compute` but for float16, whose
// conversions GCC 12 does not vectorise; and `wide`, float or double, what these loops and sums over experts compute in.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "native_elementwise.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// ---- which thread takes which rows ----

struct Block {
  int64_t expert, start, end;
  bool more;  // not the first of its expert
};

struct Plan {
  std::vector<Block> heavy;                // with all threads, one product at a time
  std::vector<std::vector<Block>> shares;  // one for each thread
  std::vector<int64_t> idle;               // experts without rows
};

// The heaviest expert first, each to the thread with least to do. An expert too heavy for one thread is left to all.
// What lies between an expert's products stays small by taking `most` rows at a time.
Plan plan_of(const Tensor& ends_E, int64_t most) {
  const int32_t* ends = ends_E.const_data_ptr<int32_t>();
  const int64_t E = ends_E.numel(), threads = at::get_num_threads();
  std::vector<int64_t> load(E), order(E), sums(threads, 0);
  for (int64_t e = 0; e < E; e++) load[e] = ends[e] - (e ? ends[e - 1] : 0);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return load[a] > load[b]; });
  Plan plan;
  plan.shares.resize(threads);
  for (int64_t e : order) {
    if (!load[e]) {
      plan.idle.push_back(e);
      continue;
    }
    std::vector<Block>* to = &plan.heavy;
    if (threads > 1 && load[e] * 2 * threads <= ends[E - 1]) {
      const int64_t thread = std::min_element(sums.begin(), sums.end()) - sums.begin();
      sums[thread] += load[e];
      to = &plan.shares[thread];
    }
    const int64_t first = ends[e] - load[e];
    for (int64_t start = first; start < ends[e]; start += most)
      to->push_back({e, start, std::min<int64_t>(start + most, ends[e]), start > first});
  }
  return plan;
}

// A buffer that this thread keeps, by number: what is written to one is gone when its number is asked for again.
Tensor scratch(size_t number, int64_t rows, int64_t columns, at::ScalarType dtype) {
  thread_local std::vector<Tensor> buffers;
  if (buffers.size() <= number) buffers.resize(number + 1);
  Tensor& buffer = buffers[number];
  if (!buffer.defined() || buffer.scalar_type() != dtype || buffer.numel() < rows * columns)
    buffer = at::empty({rows * columns}, at::TensorOptions().dtype(dtype));
  return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

// `tensor` in a dtype, in a buffer if it has another.
Tensor cast(const Tensor& tensor, at::ScalarType dtype, size_t number) {
  if (tensor.scalar_type() == dtype) return tensor;
  return scratch(number, tensor.size(0), tensor.size(1), dtype).copy_(tensor);
}

// Runs `work(block, sum)` for all blocks, where `sum` (T, D) is the thread's own, and returns the sum of these:
// memory for threads * T * D numbers while it runs.
template <class Work>
Tensor sum_over_threads(const Plan& plan, const Tensor& like_TD, at::ScalarType wide, const Work& work) {
  std::vector<Tensor> sums(plan.shares.size());
  at::parallel_for(0, plan.shares.size(), 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView guard;  // belongs to a thread
    for (int64_t i = first; i < last; i++) {
      if (plan.shares[i].empty()) continue;
      sums[i] = at::zeros(like_TD.sizes(), like_TD.options().dtype(wide));
      for (const Block& block : plan.shares[i]) work(block, sums[i]);
    }
  });
  Tensor total_TD;
  for (const Tensor& sum : sums) {
    if (!sum.defined()) continue;
    total_TD = total_TD.defined() ? total_TD.add_(sum) : sum;
  }
  if (!total_TD.defined()) total_TD = at::zeros(like_TD.sizes(), like_TD.options().dtype(wide));
  for (const Block& block : plan.heavy) work(block, total_TD);
  return total_TD;
}

Tensor rows(const Tensor& source_TD, const int64_t* token_n, int64_t n, size_t number) {
  Tensor rows_nD = scratch(number, n, source_TD.size(1), source_TD.scalar_type());
  const size_t bytes = source_TD.size(1) * source_TD.element_size();
  const char* from = static_cast<const char*>(source_TD.const_data_ptr());
  char* to = static_cast<char*>(rows_nD.mutable_data_ptr());
  for_rows(n, [&](int64_t i) { std::memcpy(to + i * bytes, from + token_n[i] * bytes, bytes); });
  return rows_nD;
}

// A token occurs once among the rows of an expert.
template <class S>
void add_rows(Tensor& sum_TD, const int64_t* token_n, const Tensor& rows_nD) {
  const int64_t n = rows_nD.size(0), D = rows_nD.size(1);
  Wide<S>* sum = sum_TD.mutable_data_ptr<Wide<S>>();
  const S* row = rows_nD.const_data_ptr<S>();
  for_rows(n, [&](int64_t i) {
    Wide<S>* to = sum + token_n[i] * D;
    const S* from = row + i * D;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) to[d] += Wide<S>(from[d]);
  });
}

// out = a @ b, or out += a @ b; where `out` is of another dtype the sum is kept in a buffer from block to block.
void product_into(Tensor out, const Tensor& a, const Tensor& b, bool more, size_t number) {
  Tensor sum = out.scalar_type() == a.scalar_type() ? out : scratch(number, out.size(0), out.size(1), a.scalar_type());
  if (more) {
    sum.addmm_(a, b);
  } else {
    at::mm_out(sum, a, b);
  }
  if (!sum.is_same(out)) out.copy_(sum);
}

// ---- forward and backward ----

struct Experts {
  const Tensor &first_EHD, &down_EDF;
  const Optional &first_bias_EH, &down_bias_ED;
};

constexpr int64_t ROWS = 1024;

// In one block where a gradient could not be added up without rounding.
int64_t rows_at_once(at::ScalarType compute) { return at::elementSize(compute) >= 4 ? ROWS : INT64_MAX / 2; }

template <class S>
Tensor forward_as(const Tensor& x_TD, const Tensor& weight_N, const Tensor& token_N, const Tensor& ends_E,
                  const Experts& experts, const Elementwise<S>& rowwise, const Optional& hidden_NH) {
  using T = Wide<S>;
  const auto stored = c10::CppTypeToScalarType<S>::value, wide = c10::CppTypeToScalarType<T>::value;
  const auto compute = x_TD.scalar_type();
  const int64_t *token = token_N.const_data_ptr<int64_t>(), F = experts.down_EDF.size(2);
  const int64_t H = experts.first_EHD.size(1);
  const T* weight = weight_N.const_data_ptr<T>();
  return sum_over_threads(plan_of(ends_E, rows_at_once(compute)), x_TD, wide, [&](const Block& block, Tensor& sum_TD) {
    const int64_t n = block.end - block.start, e = block.expert;
    Tensor x_nD = rows(x_TD, token + block.start, n, 0), kept_nH;
    if (hidden_NH) kept_nH = hidden_NH->narrow(0, block.start, n);
    const bool direct = hidden_NH && hidden_NH->scalar_type() == compute;
    Tensor h_nH = direct ? kept_nH : scratch(1, n, H, compute);
    at::mm_out(h_nH, x_nD, cast(experts.first_EHD[e], compute, 2).t());
    if (experts.first_bias_EH) h_nH.add_((*experts.first_bias_EH)[e]);
    if (hidden_NH && !direct) kept_nH.copy_(h_nH);

    Tensor stored_nH = cast(h_nH, stored, 3), a_nF = scratch(4, n, F, stored);
    rowwise.forward(stored_nH.const_data_ptr<S>(), weight + block.start, a_nF.mutable_data_ptr<S>(), n, F);
    at::mm_out(x_nD, cast(a_nF, compute, 5), cast(experts.down_EDF[e], compute, 6).t());
    if (experts.down_bias_ED)
      x_nD.addcmul_(weight_N.narrow(0, block.start, n).unsqueeze(1), (*experts.down_bias_ED)[e]);
    add_rows<S>(sum_TD, token + block.start, cast(x_nD, stored, 7));
  });
}

template <class S>
Tensor backward_as(const Tensor& d_y_TD, const Tensor& hidden_NH, const Tensor& x_TD, const Tensor& weight_N,
                   const Tensor& token_N, const Tensor& ends_E, const Experts& experts, const Elementwise<S>& rowwise,
                   Tensor& d_weight_N, const Optional& d_first_EHD, const Optional& d_down_EDF,
                   const Optional& d_first_bias_EH, const Optional& d_down_bias_ED) {
  using T = Wide<S>;
  const auto stored = c10::CppTypeToScalarType<S>::value, wide = c10::CppTypeToScalarType<T>::value;
  const auto compute = x_TD.scalar_type();
  const int64_t *token = token_N.const_data_ptr<int64_t>(), F = experts.down_EDF.size(2);
  const T* weight = weight_N.const_data_ptr<T>();
  const Plan plan = plan_of(ends_E, rows_at_once(compute));
  for (int64_t e : plan.idle) {
    for (const Optional* gradient : {&d_first_EHD, &d_down_EDF, &d_first_bias_EH, &d_down_bias_ED})
      if (*gradient) (**gradient)[e].zero_();
  }
  return sum_over_threads(plan, x_TD, wide, [&](const Block& block, Tensor& sum_TD) {
    const int64_t n = block.end - block.start, e = block.expert;
    Tensor x_nD = rows(x_TD, token + block.start, n, 0), g_nD = rows(d_y_TD, token + block.start, n, 1);
    Tensor h_nH = cast(hidden_NH.narrow(0, block.start, n), stored, 2);
    // Without its combine weight, the gradient of the second product's input times that input is the gradient of
    // the combine weight: the expert's output need not be kept.
    Tensor d_a_nF = scratch(3, n, F, compute);
    at::mm_out(d_a_nF, g_nD, cast(experts.down_EDF[e], compute, 4));
    d_a_nF = cast(d_a_nF, stored, 5);
    Tensor a_nF = scratch(6, n, F, stored), d_h_nH = scratch(7, n, h_nH.size(1), stored);
    rowwise.backward(h_nH.const_data_ptr<S>(), weight + block.start, d_a_nF.const_data_ptr<S>(),
                     a_nF.mutable_data_ptr<S>(), d_h_nH.mutable_data_ptr<S>(),
                     d_weight_N.mutable_data_ptr<T>() + block.start, n, F);
    if (d_down_EDF) product_into((*d_down_EDF)[e], g_nD.t(), cast(a_nF, compute, 8), block.more, 9);
    if (d_down_bias_ED) {
      Tensor weight_n1 = weight_N.narrow(0, block.start, n).unsqueeze(1).to(compute);
      product_into((*d_down_bias_ED)[e].unsqueeze(1), g_nD.t(), weight_n1, block.more, 10);
    }
    if (experts.down_bias_ED) {
      Tensor from_bias_n1 = scratch(16, n, 1, compute);
      at::mm_out(from_bias_n1, g_nD, (*experts.down_bias_ED)[e].unsqueeze(1).to(compute));
      d_weight_N.narrow(0, block.start, n).add_(from_bias_n1.squeeze(1));
    }
    Tensor g_nH = cast(d_h_nH, compute, 11);
    if (d_first_EHD) product_into((*d_first_EHD)[e], g_nH.t(), x_nD, block.more, 12);
    if (d_first_bias_EH) {
      Tensor ones_n1 = scratch(13, n, 1, compute).fill_(1);
      product_into((*d_first_bias_EH)[e].unsqueeze(1), g_nH.t(), ones_n1, block.more, 14);
    }
    at::mm_out(g_nD, g_nH, cast(experts.first_EHD[e], compute, 4));
    add_rows<S>(sum_TD, token + block.start, cast(g_nD, stored, 15));
  });
}

// x is in the dtype of the products; weight in float, or double with double.
Tensor forward(const Tensor& x_TD, const Tensor& weight_N, const Tensor& token_N, const Tensor& ends_E,
               const Tensor& first_EHD, const Tensor& down_EDF, const Optional& first_bias_EH,
               const Optional& down_bias_ED, std::string activation, bool gated, const Optional& hidden_NH) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Experts experts{first_EHD, down_EDF, first_bias_EH, down_bias_ED};
  auto as = [&](const auto& rowwise) {
    return forward_as(x_TD, weight_N, token_N, ends_E, experts, rowwise, hidden_NH);
  };
  if (x_TD.scalar_type() == at::kDouble) return as(elementwise<double>(activation, gated));
  if (x_TD.scalar_type() == at::kBFloat16) return as(elementwise<at::BFloat16>(activation, gated));
  return as(elementwise<float>(activation, gated));
}

Tensor backward(const Tensor& d_y_TD, const Tensor& hidden_NH, const Tensor& x_TD, const Tensor& weight_N,
                const Tensor& token_N, const Tensor& ends_E, const Tensor& first_EHD, const Tensor& down_EDF,
                const Optional& first_bias_EH, const Optional& down_bias_ED, std::string activation, bool gated,
                Tensor d_weight_N, const Optional& d_first_EHD, const Optional& d_down_EDF,
                const Optional& d_first_bias_EH, const Optional& d_down_bias_ED) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Experts experts{first_EHD, down_EDF, first_bias_EH, down_bias_ED};
  auto as = [&](const auto& rowwise) {
    return backward_as(d_y_TD, hidden_NH, x_TD, weight_N, token_N, ends_E, experts, rowwise, d_weight_N, d_first_EHD,
                       d_down_EDF, d_first_bias_EH, d_down_bias_ED);
  };
  if (x_TD.scalar_type() == at::kDouble) return as(elementwise<double>(activation, gated));
  if (x_TD.scalar_type() == at::kBFloat16) return as(elementwise<at::BFloat16>(activation, gated));
  return as(elementwise<float>(activation, gated));
}

}  // namespace

TORCH_LIBRARY(moewright_native, library) {
  library.def(
      "forward(Tensor x, Tensor weight, Tensor token, Tensor ends, Tensor first, Tensor down, Tensor? first_bias, "
      "Tensor? down_bias, str activation, bool gated, Tensor(a!)? hidden) -> Tensor",
      &forward);
  library.def(
      "backward(Tensor d_y, Tensor hidden, Tensor x, Tensor weight, Tensor token, Tensor ends, Tensor first, "
      "Tensor down, Tensor? first_bias, Tensor? down_bias, str activation, bool gated, Tensor(a!) d_weight, "
      "Tensor(b!)? d_first, Tensor(c!)? d_down, Tensor(d!)? d_first_bias, Tensor(e!)? d_down_bias) -> Tensor",
      &backward);
}
