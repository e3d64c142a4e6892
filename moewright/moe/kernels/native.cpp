// All experts on a CPU: one expert at a time on each thread, its rows staying in the cache.
//
// Letters: T tokens, K choices a token, N = T * K assignments sorted by expert, D model width, E experts, F expert
// width, H width of the first product (2F when gated, the gate half first; else F), n rows of one expert, m those
// rows and what they are padded with, R rows of all experts so padded. See native.py, which compiles this.
//
// Three dtypes beside that of the weights: `compute`, that of the matrix products, in which the caller passes x and the
// gradient of y; `stored`, or S, what the loops over elements read and write, which is `compute` but float for
// float16; and `wide`, float or double, what these loops and sums over experts compute in.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "native_elementwise.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// ---- which thread takes which rows ----

struct Block {
  int64_t expert, start, n;  // `start` among the sorted assignments
  int64_t row, m;            // where it starts among the padded rows, and how many they are
  bool more;                 // not the first of its expert
};

struct Plan {
  std::vector<std::vector<Block>> light, heavy;  // of each expert; those of a heavy one with all threads at once
  std::vector<int64_t> idle;                     // experts without rows
};

constexpr int64_t ROWS = 1024;

// The heaviest expert first. One that is too heavy for a single thread is left to all.
//
// What lies between an expert's products stays small by taking ROWS rows at a time, but for short dtypes, in which a
// gradient cannot be added up without rounding. Those are padded: oneDNN compiles code for each shape of a product in
// them, takes as long for it as for the product of hundreds of rows, and keeps a thousand. So there are few numbers of
// rows, multiples of `multiple` and of a 16th of the power of two below. (A multiple of 1: no padding.)
Plan plan_of(const Tensor& ends_E, int64_t multiple) {
  const int32_t* ends = ends_E.const_data_ptr<int32_t>();
  const int64_t E = ends_E.numel(), threads = at::get_num_threads(), most = multiple == 1 ? ROWS : INT64_MAX / 2;
  auto padded = [&](int64_t n) {
    if (multiple == 1) return n;
    const int64_t step = std::max<int64_t>(multiple, std::bit_floor<uint64_t>(n - 1) / 16);
    return (n + step - 1) / step * step;
  };
  std::vector<int64_t> load(E), order(E), row(E);
  for (int64_t e = 0; e < E; e++) {
    load[e] = ends[e] - (e ? ends[e - 1] : 0);
    row[e] = e ? row[e - 1] + padded(load[e - 1]) : 0;
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return load[a] > load[b]; });
  Plan plan;
  for (int64_t e : order) {
    if (!load[e]) {
      plan.idle.push_back(e);
      continue;
    }
    std::vector<Block>& blocks = (load[e] * threads > ends[E - 1] ? plan.heavy : plan.light).emplace_back();
    for (int64_t done = 0, n; done < load[e]; done += n) {
      n = std::min(most, load[e] - done);
      blocks.push_back({e, ends[e] - load[e] + done, n, row[e] + done, padded(n), done > 0});
    }
  }
  return plan;
}

// A thread takes the next expert when it is done with one: no result depends on who does which.
template <class Work>
void for_blocks(const Plan& plan, const Work& work) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView guard;  // belongs to a thread
    for (size_t i; (i = next++) < plan.light.size();)
      for (const Block& block : plan.light[i]) work(block);
  });
  for (const std::vector<Block>& blocks : plan.heavy)
    for (const Block& block : blocks) work(block);
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

// The rows of a block's tokens, and zeros.
Tensor gather(const Tensor& source_TD, const int64_t* token_n, const Block& block, size_t number) {
  Tensor rows_mD = scratch(number, block.m, source_TD.size(1), source_TD.scalar_type());
  const size_t bytes = source_TD.size(1) * source_TD.element_size();
  const char* from = static_cast<const char*>(source_TD.const_data_ptr());
  char* to = static_cast<char*>(rows_mD.mutable_data_ptr());
  for_rows(block.n, [&](int64_t i) { std::memcpy(to + i * bytes, from + token_n[i] * bytes, bytes); });
  std::memset(to + block.n * bytes, 0, (block.m - block.n) * bytes);
  return rows_mD;
}

// y = for each token the sum over its choices, in their order: the same whatever the number of threads.
template <class S>
void add_choices(const Plan& plan, const Tensor& order_N, const Tensor& rows_RD, Tensor& y_TD) {
  const int64_t T = y_TD.size(0), D = y_TD.size(1), K = T ? order_N.numel() / T : 0;
  const int64_t* order = order_N.const_data_ptr<int64_t>();
  std::vector<int64_t> row_TK(T * K, -1);
  for (const auto* experts : {&plan.light, &plan.heavy})
    for (const std::vector<Block>& blocks : *experts)
      for (const Block& block : blocks)
        for (int64_t i = 0; i < block.n; i++) row_TK[order[block.start + i]] = block.row + i;
  const S* rows = rows_RD.const_data_ptr<S>();
  S* y = y_TD.mutable_data_ptr<S>();
  at::parallel_for(0, T, 64, [&](int64_t first, int64_t last) {
    std::vector<Wide<S>> sum(D);
    for (int64_t t = first; t < last; t++) {
      std::fill(sum.begin(), sum.end(), 0);
      for (int64_t k = 0; k < K; k++) {
        if (row_TK[t * K + k] < 0) continue;
        const S* row = rows + row_TK[t * K + k] * D;
#pragma omp simd
        for (int64_t d = 0; d < D; d++) sum[d] += load(row[d]);
      }
#pragma omp simd
      for (int64_t d = 0; d < D; d++) store(y[t * D + d], sum[d]);
    }
  });
}

// out = sum, of bfloat16, as float: past the cache, which a gradient of all experts does not fit into anyway, so that the
// memory is not read before it is written.
void widen_into(const Tensor& out, const Tensor& sum) {
#ifdef __SSE2__
  constexpr size_t LARGE = 1 << 24;
  const bool widens = out.scalar_type() == at::kFloat && sum.scalar_type() == at::kBFloat16;
  const bool whole = out.is_contiguous() && sum.is_contiguous() && out.numel() % 8 == 0;
  float* to = widens ? out.mutable_data_ptr<float>() : nullptr;
  if (widens && whole && reinterpret_cast<uintptr_t>(to) % 16 == 0 && out.storage().nbytes() >= LARGE) {
    const at::BFloat16* from = sum.const_data_ptr<at::BFloat16>();
    at::parallel_for(0, out.numel() / 8, 8192, [&](int64_t first, int64_t last) {
      for (int64_t i = first * 8; i < last * 8; i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)), zero = _mm_setzero_si128();
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_unpacklo_epi16(zero, eight));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + 4), _mm_unpackhi_epi16(zero, eight));
      }
      _mm_sfence();  // before another thread reads it
    });
    return;
  }
#endif
  out.copy_(sum);
}

// out = a @ b, or out += a @ b; where `out` is of another dtype the sum is kept in a buffer from block to block.
void product_into(Tensor out, const Tensor& a, const Tensor& b, bool more, size_t number) {
  Tensor sum = out.scalar_type() == a.scalar_type() ? out : scratch(number, out.size(0), out.size(1), a.scalar_type());
  if (more) {
    sum.addmm_(a, b);
  } else {
    at::mm_out(sum, a, b);
  }
  if (!sum.is_same(out)) widen_into(out, sum);
}

// out = the sum of a block's rows, or the sum of `weight` times them; kept in a buffer from block to block.
template <class S>
void sum_into(Tensor out, const Tensor& rows_mW, const Wide<S>* weight_n, const Block& block, size_t number) {
  const int64_t width = out.numel();
  Tensor sum = scratch(number, 1, width, c10::CppTypeToScalarType<Wide<S>>::value);
  if (!block.more) sum.zero_();
  const S* rows = rows_mW.const_data_ptr<S>();
  Wide<S>* to = sum.mutable_data_ptr<Wide<S>>();
  at::parallel_for(0, width, 512, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < block.n; i++) {
      const Wide<S> weight = weight_n ? weight_n[i] : Wide<S>(1);
#pragma omp simd
      for (int64_t d = first; d < last; d++) to[d] += weight * load(rows[i * width + d]);
    }
  });
  out.copy_(sum.view_as(out));
}

// ---- forward and backward ----

struct Experts {
  const Tensor &first_EHD, &down_EDF;
  const Optional &first_bias_EH, &down_bias_ED;
};

struct Routes {
  const Tensor &weight_N, &token_N, &order_N, &ends_E;
  int64_t multiple;  // see plan_of
};

template <class S>
void forward_as(const Tensor& x_TD, const Routes& routes, const Experts& experts, const Elementwise<S>& rowwise,
                Tensor& rows_RD, Tensor& y_TD, const Optional& hidden_RH) {
  const auto stored = c10::CppTypeToScalarType<S>::value, compute = x_TD.scalar_type();
  const int64_t *token = routes.token_N.const_data_ptr<int64_t>(), F = experts.down_EDF.size(2);
  const int64_t H = experts.first_EHD.size(1);
  const Wide<S>* weight = routes.weight_N.const_data_ptr<Wide<S>>();
  const Plan plan = plan_of(routes.ends_E, routes.multiple);
  for_blocks(plan, [&](const Block& block) {
    const int64_t m = block.m, e = block.expert;
    Tensor x_mD = gather(x_TD, token + block.start, block, 0), kept_mH;
    if (hidden_RH) kept_mH = hidden_RH->narrow(0, block.row, m);
    const bool direct = hidden_RH && hidden_RH->scalar_type() == compute;
    Tensor h_mH = direct ? kept_mH : scratch(1, m, H, compute);
    at::mm_out(h_mH, x_mD, cast(experts.first_EHD[e], compute, 2).t());
    if (experts.first_bias_EH) h_mH.add_((*experts.first_bias_EH)[e]);
    if (hidden_RH && !direct) kept_mH.copy_(h_mH);

    // The padding of `a` is what was left there: it meets no row but its own.
    Tensor stored_mH = cast(h_mH, stored, 3), a_mF = scratch(4, m, F, stored), y_mD = rows_RD.narrow(0, block.row, m);
    rowwise.forward(stored_mH.const_data_ptr<S>(), weight + block.start, a_mF.mutable_data_ptr<S>(), block.n, F);
    product_into(y_mD, cast(a_mF, compute, 5), cast(experts.down_EDF[e], compute, 6).t(), false, 7);
    if (experts.down_bias_ED)
      y_mD.narrow(0, 0, block.n)
          .addcmul_(routes.weight_N.narrow(0, block.start, block.n).unsqueeze(1), (*experts.down_bias_ED)[e]);
  });
  add_choices<S>(plan, routes.order_N, rows_RD, y_TD);
}

struct Gradients {
  Tensor& weight_N;
  const Optional &first_EHD, &down_EDF, &first_bias_EH, &down_bias_ED;
};

template <class S>
void backward_as(const Tensor& d_y_TD, const Tensor& hidden_RH, const Tensor& x_TD, const Routes& routes,
                 const Experts& experts, const Elementwise<S>& rowwise, Tensor& rows_RD, Tensor& d_x_TD,
                 const Gradients& gradients) {
  const auto stored = c10::CppTypeToScalarType<S>::value, compute = x_TD.scalar_type();
  const int64_t *token = routes.token_N.const_data_ptr<int64_t>(), F = experts.down_EDF.size(2);
  const int64_t H = hidden_RH.size(1);
  const Wide<S>* weight = routes.weight_N.const_data_ptr<Wide<S>>();
  Wide<S>* d_weight = gradients.weight_N.mutable_data_ptr<Wide<S>>();
  const Plan plan = plan_of(routes.ends_E, routes.multiple);
  for (int64_t e : plan.idle) {
    for (const Optional* gradient :
         {&gradients.first_EHD, &gradients.down_EDF, &gradients.first_bias_EH, &gradients.down_bias_ED})
      if (*gradient) (**gradient)[e].zero_();
  }
  for_blocks(plan, [&](const Block& block) {
    const int64_t m = block.m, n = block.n, e = block.expert;
    Tensor x_mD = gather(x_TD, token + block.start, block, 0), g_mD = gather(d_y_TD, token + block.start, block, 1);
    Tensor h_mH = cast(hidden_RH.narrow(0, block.row, m), stored, 2);
    // Without its combine weight, the gradient of the second product's input times that input is the gradient of
    // the combine weight: the expert's output need not be kept.
    Tensor d_a_mF = scratch(3, m, F, compute);
    at::mm_out(d_a_mF, g_mD, cast(experts.down_EDF[e], compute, 4));
    d_a_mF = cast(d_a_mF, stored, 5);
    Tensor a_mF = scratch(6, m, F, stored), d_h_mH = scratch(7, m, H, stored);
    rowwise.backward(h_mH.const_data_ptr<S>(), weight + block.start, d_a_mF.const_data_ptr<S>(),
                     a_mF.mutable_data_ptr<S>(), d_h_mH.mutable_data_ptr<S>(), d_weight + block.start, n, F);
    for (Tensor* padded : {&a_mF, &d_h_mH})  // it is summed over below
      if (m > n) padded->narrow(0, n, m - n).zero_();
    if (gradients.down_EDF) product_into((*gradients.down_EDF)[e], g_mD.t(), cast(a_mF, compute, 8), block.more, 9);
    if (gradients.down_bias_ED)
      sum_into<S>((*gradients.down_bias_ED)[e], cast(g_mD, stored, 10), weight + block.start, block, 11);
    if (experts.down_bias_ED) {
      Tensor from_bias_m1 = scratch(12, m, 1, compute);
      at::mm_out(from_bias_m1, g_mD, (*experts.down_bias_ED)[e].unsqueeze(1).to(compute));
      gradients.weight_N.narrow(0, block.start, n).add_(from_bias_m1.squeeze(1).narrow(0, 0, n));
    }
    Tensor g_mH = cast(d_h_mH, compute, 13);
    if (gradients.first_EHD) product_into((*gradients.first_EHD)[e], g_mH.t(), x_mD, block.more, 14);
    if (gradients.first_bias_EH) sum_into<S>((*gradients.first_bias_EH)[e], d_h_mH, nullptr, block, 15);
    product_into(rows_RD.narrow(0, block.row, m), g_mH, cast(experts.first_EHD[e], compute, 4), false, 16);
  });
  add_choices<S>(plan, routes.order_N, rows_RD, d_x_TD);
}

// x and the gradient of y are in the dtype of the products; weight in float, or double with double; rows, y and the
// gradient of x in what is stored.
template <class Run>
void in_dtype_of(const Tensor& x_TD, const std::string& activation, bool gated, const Run& run) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (x_TD.scalar_type() == at::kDouble) return run(elementwise<double>(activation, gated));
  if (x_TD.scalar_type() == at::kBFloat16) return run(elementwise<at::BFloat16>(activation, gated));
  run(elementwise<float>(activation, gated));
}

void forward(const Tensor& x_TD, const Tensor& weight_N, const Tensor& token_N, const Tensor& order_N,
             const Tensor& ends_E, const Tensor& first_EHD, const Tensor& down_EDF, const Optional& first_bias_EH,
             const Optional& down_bias_ED, std::string activation, bool gated, int64_t multiple, Tensor rows_RD,
             Tensor y_TD, const Optional& hidden_RH) {
  const Experts experts{first_EHD, down_EDF, first_bias_EH, down_bias_ED};
  const Routes routes{weight_N, token_N, order_N, ends_E, multiple};
  in_dtype_of(x_TD, activation, gated, [&](const auto& rowwise) {
    forward_as(x_TD, routes, experts, rowwise, rows_RD, y_TD, hidden_RH);
  });
}

void backward(const Tensor& d_y_TD, const Tensor& hidden_RH, const Tensor& x_TD, const Tensor& weight_N,
              const Tensor& token_N, const Tensor& order_N, const Tensor& ends_E, const Tensor& first_EHD,
              const Tensor& down_EDF, const Optional& first_bias_EH, const Optional& down_bias_ED,
              std::string activation, bool gated, int64_t multiple, Tensor rows_RD, Tensor d_x_TD, Tensor d_weight_N,
              const Optional& d_first_EHD, const Optional& d_down_EDF, const Optional& d_first_bias_EH,
              const Optional& d_down_bias_ED) {
  const Experts experts{first_EHD, down_EDF, first_bias_EH, down_bias_ED};
  const Routes routes{weight_N, token_N, order_N, ends_E, multiple};
  const Gradients gradients{d_weight_N, d_first_EHD, d_down_EDF, d_first_bias_EH, d_down_bias_ED};
  in_dtype_of(x_TD, activation, gated, [&](const auto& rowwise) {
    backward_as(d_y_TD, hidden_RH, x_TD, routes, experts, rowwise, rows_RD, d_x_TD, gradients);
  });
}

}  // namespace

TORCH_LIBRARY(moewright_native, library) {
  library.def(
      "forward(Tensor x, Tensor weight, Tensor token, Tensor order, Tensor ends, Tensor first, Tensor down, "
      "Tensor? first_bias, Tensor? down_bias, str activation, bool gated, int multiple, Tensor(a!) rows, Tensor(b!) y, "
      "Tensor(c!)? hidden) -> ()",
      &forward);
  library.def(
      "backward(Tensor d_y, Tensor hidden, Tensor x, Tensor weight, Tensor token, Tensor order, Tensor ends, "
      "Tensor first, Tensor down, Tensor? first_bias, Tensor? down_bias, str activation, bool gated, int multiple, "
      "Tensor(a!) rows, Tensor(b!) d_x, Tensor(c!) d_weight, Tensor(d!)? d_first, Tensor(e!)? d_down, "
      "Tensor(f!)? d_first_bias, Tensor(g!)? d_down_bias) -> ()",
      &backward);
}
