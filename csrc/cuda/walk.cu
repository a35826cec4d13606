#include "walk.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device_warp.h"
#include "half.h"
#include "runtime.h"
#include "walk_layout.h"

namespace spnet::cuda {
namespace {

constexpr int kQueuesAtOnce = 1024;

template <class Element>
__global__ void __launch_bounds__(kThreads, 1)
    walk_kernel(const __grid_constant__ Network network, const Block* __restrict__ blocks,
                const uint4* __restrict__ weights, const float* __restrict__ floats,
                const __grid_constant__ WalkBatch batch, Queue* queue) {
  DeviceWarp<Element> warp;
  Walk(warp, network, blocks, weights, floats, batch).run(queue, gridDim.x);
}

using Kernel = decltype(&walk_kernel<__half>);

template <class Element>
constexpr Kernel kernel_of = nullptr;
template <>
constexpr Kernel kernel_of<Float16> = &walk_kernel<__half>;
template <>
constexpr Kernel kernel_of<BFloat16> = &walk_kernel<__nv_bfloat16>;

// The shared memory that a launch may ask for, beside what the kernel has of its own.
int64_t shared_limit(Kernel kernel, int device) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
         static_cast<int64_t>(attributes.sharedSizeBytes);
}

void require_tensor_cores(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  if (major >= 8) return;
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  throw std::invalid_argument("plan: device: expected compute capability 8.0 or higher, got " +
                              std::to_string(major) + "." + std::to_string(minor));
}

// Lets this thread allocate while another one, or itself, captures a stream.
class CaptureSafe {
 public:
  CaptureSafe() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~CaptureSafe() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureSafe(const CaptureSafe&) = delete;
  CaptureSafe& operator=(const CaptureSafe&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) {
    check(cudaMalloc(&data_, std::max<size_t>(size, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    // From pageable memory it returns with the last piece on its way, and other streams do not wait for that.
    check(cudaStreamSynchronize(cudaStreamLegacy), "cudaMemcpy");
  }
  DeviceArray(DeviceArray&& other) : data_(std::exchange(other.data_, nullptr)) {}
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Queues for launches that may run at the same time: one for each stream, and one for each captured launch,
// for a graph may run beside the stream that captured it.
class Queues {
 public:
  Queues() { grow(); }

  Queue* of(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    std::lock_guard<std::mutex> lock(mutex_);
    if (status != cudaStreamCaptureStatusNone) return take();
    unsigned long long id;  // of no other stream ever, unlike the handle
    check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    Queue*& queue = of_stream_[id];
    if (queue == nullptr) queue = take();
    return queue;
  }

 private:
  Queue* take() {
    if (used_ == kQueuesAtOnce) grow();
    return chunks_.back().get() + used_++;
  }

  void grow() {
    const CaptureSafe safe;
    chunks_.emplace_back(kQueuesAtOnce);
    used_ = 0;
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    const cudaError_t set = cudaMemsetAsync(chunks_.back().get(), 0, kQueuesAtOnce * sizeof(Queue), stream);
    const cudaError_t done = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check(set, "cudaMemset");
    check(done, "cudaMemset");
  }

  std::mutex mutex_;
  std::vector<DeviceArray<Queue>> chunks_;
  int used_ = 0;
  std::map<unsigned long long, Queue*> of_stream_;
};

}  // namespace

struct DevicePlan::State {
  State(const WalkLayout& layout, Kernel kernel, int device)
      : network(layout.network),
        kernel(kernel),
        device(device),
        blocks(layout.blocks),
        weights(layout.weights),
        floats(layout.floats) {
    // All that any plan may need: the kernel's attribute is one for all plans.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_limit(kernel, device))),
          "cudaFuncSetAttribute");
    int resident = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, network.shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    grid = int64_t{resident} * attribute(cudaDevAttrMultiProcessorCount, device);
  }

  const Network network;
  const Kernel kernel;
  const int device;
  int64_t grid;
  DeviceArray<Block> blocks;
  DeviceArray<uint16_t> weights;
  DeviceArray<float> floats;
  Queues queues;
};

template <class Element>
std::unique_ptr<DevicePlan> DevicePlan::make(const Plan& plan, const float* floats, int device) {
  const DeviceGuard guard(device);
  require_tensor_cores(device);
  const Kernel kernel = kernel_of<Element>;
  const WalkLayout layout = lay_out_walk<Element>(plan, floats, shared_limit(kernel, device));
  return std::unique_ptr<DevicePlan>(new DevicePlan(std::make_unique<State>(layout, kernel, device)));
}

template std::unique_ptr<DevicePlan> DevicePlan::make<Float16>(const Plan&, const float*, int);
template std::unique_ptr<DevicePlan> DevicePlan::make<BFloat16>(const Plan&, const float*, int);

DevicePlan::DevicePlan(std::unique_ptr<State> state) : state_(std::move(state)) {}

DevicePlan::~DevicePlan() {
  try {
    const DeviceGuard guard(state_->device);
    const CaptureSafe safe;
    state_.reset();
  } catch (const std::runtime_error&) {
    // The context is gone, and the memory with it.
  }
}

void DevicePlan::run(const WalkBatch& batch, std::uintptr_t stream) const {
  check_batch(batch, state_->network.n_blocks);
  if (batch.size == 0) return;
  const DeviceGuard guard(state_->device);
  const auto native_stream = reinterpret_cast<cudaStream_t>(stream);
  const int grid = static_cast<int>(std::min(batch.size, state_->grid));
  state_->kernel<<<grid, kThreads, state_->network.shared_bytes, native_stream>>>(
      state_->network, state_->blocks.get(), reinterpret_cast<const uint4*>(state_->weights.get()),
      state_->floats.get(), batch, state_->queues.of(native_stream));
  check(cudaGetLastError(), "walk launch");
}

int64_t DevicePlan::shared_bytes() const { return state_->network.shared_bytes; }

}  // namespace spnet::cuda
