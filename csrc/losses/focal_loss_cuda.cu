// sigmoid, quality and varifocal loss on a GPU: one pass over the inputs each for losses and gradients.
#include "losses/focal_loss.h"
#include "losses/loss_cuda.cuh"

namespace DETOPS_NAMESPACE {
namespace {

// The targets of a pack of inputs from `begin` on, and for which of them there is a loss.
template <class S>
struct DenseTargets {
  const S* values;

  template <class T, int size>
  __device__ void load(int64_t begin, int count, bool packed, T (&targets)[size], bool (&counts)[size]) const {
    load_pack(values + begin, count, packed, targets);
#pragma unroll
    for (int i = 0; i < size; ++i) counts[i] = true;
  }
};

template <class T>
struct ClassTargets {
  const int64_t* labels;
  const T* scores;  // null: 1
  int64_t classes;

  template <int size>
  __device__ void load(int64_t begin, int count, bool, T (&targets)[size], bool (&counts)[size]) const {
    // A division of 32-bit numbers takes a fraction of the time.
    int64_t row = (begin | classes) >> 32 ? begin / classes : uint32_t(begin) / uint32_t(classes);
    int64_t column = begin - row * classes;
    int64_t label = labels[row];
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (column == classes && i < count) {
        column = 0;
        label = labels[++row];
      }
      const bool positive = label == column && i < count;
      targets[i] = positive ? (scores ? scores[row] : T(1)) : T(0);
      counts[i] = class_counts(label, classes);
      ++column;
    }
  }
};

template <FocalKind kind, class S, class Targets>
__global__ void focal_loss_kernel(const S* inputs, Targets targets, int64_t count, FocalOptions<ComputeType<S>> options,
                                  bool packed, S* out, double* sums) {
  using T = ComputeType<S>;
  constexpr int kSize = Pack<S>::kSize;
  double sum = 0;
  for (int step = 0; step < kLossSteps; ++step) {
    const int64_t begin = ((int64_t(blockIdx.x) * kLossSteps + step) * kLossThreads + threadIdx.x) * kSize;
    if (begin >= count) break;
    const int present = static_cast<int>(min_of<int64_t>(kSize, count - begin));
    T input[kSize], target[kSize], losses[kSize];
    bool counts[kSize];
    load_pack(inputs + begin, present, packed, input);
    targets.load(begin, present, packed, target, counts);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const T loss = options.square ? focal_value<kind, true>(input[i], target[i], options)
                                    : focal_value<kind, false>(input[i], target[i], options);
      losses[i] = counts[i] ? loss : T(0);
      if (i < present) sum += static_cast<double>(losses[i]);
    }
    if (sums == nullptr) store_pack(losses, present, packed, out + begin);
  }
  if (sums == nullptr) return;
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <FocalKind kind, class S, class Targets>
__global__ void focal_loss_backward_kernel(UpstreamView<S> grad, const S* inputs, Targets targets, int64_t count,
                                           FocalOptions<ComputeType<S>> options, bool packed, S* out) {
  using T = ComputeType<S>;
  constexpr int kSize = Pack<S>::kSize;
  for (int step = 0; step < kLossSteps; ++step) {
    const int64_t begin = ((int64_t(blockIdx.x) * kLossSteps + step) * kLossThreads + threadIdx.x) * kSize;
    if (begin >= count) break;
    const int present = static_cast<int>(min_of<int64_t>(kSize, count - begin));
    T input[kSize], target[kSize], upstream[kSize], result[kSize];
    bool counts[kSize];
    load_pack(inputs + begin, present, packed, input);
    targets.load(begin, present, packed, target, counts);
    if (grad.step == 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) upstream[i] = static_cast<T>(*grad.grad);
    } else {
      load_pack(grad.grad + begin, present, packed, upstream);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const T slope = options.square ? focal_gradient<kind, true>(input[i], target[i], options)
                                     : focal_gradient<kind, false>(input[i], target[i], options);
      result[i] = counts[i] ? slope * (upstream[i] * grad.factor) : T(0);
    }
    store_pack(result, present, packed, out + begin);
  }
}

// Calls body(constant of the kind, targets) for inputs of type S.
template <class S, class Body>
void dispatch_targets(const FocalTensors& tensors, FocalKind focal_kind, const Body& body) {
  using T = ComputeType<S>;
  dispatch_focal(focal_kind, [&](auto kind) {
    // Quality loss has class targets only, and varifocal loss dense ones.
    if constexpr (decltype(kind)::value != FocalKind::kVarifocal) {
      if (tensors.classes) {
        const T* const scores = tensors.scores.defined() ? tensors.scores.const_data_ptr<T>() : nullptr;
        return body(kind, ClassTargets<T>{tensors.targets.const_data_ptr<int64_t>(), scores, tensors.classes});
      }
    }
    if constexpr (decltype(kind)::value != FocalKind::kQuality) {
      body(kind, DenseTargets<S>{tensors.targets.const_data_ptr<S>()});
    }
  });
}

// Class targets are not read in packs.
bool are_packed(const FocalTensors& tensors, const Tensor& out) {
  return is_aligned(tensors.inputs.const_data_ptr()) && is_aligned(out.const_data_ptr()) &&
         (tensors.classes || is_aligned(tensors.targets.const_data_ptr()));
}

}  // namespace

void focal_loss_cuda(const FocalTensors& tensors, FocalKind focal_kind, double alpha, double exponent,
                     Reduction reduction, const Tensor& out) {
  const CudaScope scope(tensors.inputs);
  const int64_t count = tensors.inputs.numel();
  dispatch_floating(tensors.inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const auto options = focal_options<ComputeType<S>>(focal_kind, alpha, exponent);
    dispatch_targets<S>(tensors, focal_kind, [&](auto kind, auto targets) {
      reduce_losses<S>("focal_loss", count, kLossThreads * kLossSteps * Pack<S>::kSize, reduction, scope, out,
                       [&](unsigned blocks, double* sums) {
                         DETOPS_LAUNCH((focal_loss_kernel<decltype(kind)::value, S, decltype(targets)>), blocks,
                                       kLossThreads, 0, scope.stream(), tensors.inputs.const_data_ptr<S>(), targets,
                                       count, options, are_packed(tensors, out), out.mutable_data_ptr<S>(), sums);
                       });
    });
  });
}

void focal_loss_backward_cuda(const Upstream& upstream, const FocalTensors& tensors, FocalKind focal_kind, double alpha,
                              double exponent, const Tensor& out) {
  const CudaScope scope(tensors.inputs);
  const int64_t count = tensors.inputs.numel();
  const bool packed = are_packed(tensors, out) && (upstream.step == 0 || is_aligned(upstream.grad.const_data_ptr()));
  dispatch_floating(tensors.inputs.scalar_type(), [&](auto tag) {
    using S = typename decltype(tag)::type;
    const auto options = focal_options<ComputeType<S>>(focal_kind, alpha, exponent);
    const unsigned blocks = blocks_for("focal_loss", "the inputs", count, kLossThreads * kLossSteps * Pack<S>::kSize);
    dispatch_targets<S>(tensors, focal_kind, [&](auto kind, auto targets) {
      DETOPS_LAUNCH((focal_loss_backward_kernel<decltype(kind)::value, S, decltype(targets)>), blocks, kLossThreads, 0,
                    scope.stream(), UpstreamView<S>(upstream), tensors.inputs.const_data_ptr<S>(), targets, count,
                    options, packed, out.mutable_data_ptr<S>());
    });
  });
}

}  // namespace DETOPS_NAMESPACE
