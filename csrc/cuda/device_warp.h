// The vocabulary of walk_kernel.h on a GPU: a lane is a thread, and every word is an instruction or a few.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "walk_kernel.h"

namespace spnet::cuda {

extern __shared__ uint4 shared_memory[];

template <class Element>
class DeviceWarp {
  static constexpr bool kHalf = __is_same(Element, __half);

 public:
  using Int = int;
  using Long = int64_t;
  using Word = uint32_t;
  using Float = float;
  using Bool = bool;

  // The shuffle tells the compiler that the index is the same in all lanes.
  __device__ DeviceWarp()
      : index_(__shfl_sync(kAll, threadIdx.x / kLanes, 0)),
        lane_(threadIdx.x % kLanes),
        shared_(static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))) {}

  SPNET_DEVICE int index() const { return index_; }
  SPNET_DEVICE int lane() const { return lane_; }

  template <class T>
  SPNET_DEVICE static T select(bool condition, T yes, T no) {
    return condition ? yes : no;
  }

  SPNET_DEVICE void barrier() { __syncthreads(); }
  SPNET_DEVICE float shuffle_xor(float value, int mask) const { return __shfl_xor_sync(kAll, value, mask); }

  // --- Queue -----------------------------------------------------------------------------------------------

  SPNET_DEVICE int64_t take_sample(Queue* queue) const {
    return __shfl_sync(kAll, lane_ == 0 ? atomicAdd(&queue->next, 1ull) : 0ull, 0);
  }
  SPNET_DEVICE void leave(Queue* queue, int thread_blocks) const {
    if (lane_ != 0) return;
    __threadfence();  // whoever sees this block leave sees that it takes no more
    if (atomicAdd(&queue->finished, 1ull) + 1 == thread_blocks) *queue = Queue{};
  }
  SPNET_DEVICE void store_sample(int offset, int64_t sample) {
    if (lane_ == 0) *at<int64_t>(offset) = sample;
  }
  SPNET_DEVICE int64_t load_sample(int offset) { return *at<int64_t>(offset); }

  // --- Shared memory: offsets in bytes ---------------------------------------------------------------------

  template <class T>
  SPNET_DEVICE const T* shared(int offset) {
    return at<T>(offset);
  }

  SPNET_DEVICE uint32_t load(int offset, bool where) { return where ? *at<uint32_t>(offset) : 0u; }
  SPNET_DEVICE void store(int offset, uint32_t value, bool where) {
    if (where) *at<uint32_t>(offset) = value;
  }
  SPNET_DEVICE float load_float(int offset, bool where) { return where ? *at<float>(offset) : 0.f; }
  SPNET_DEVICE void store_float(int offset, float value, bool where) {
    if (where) *at<float>(offset) = value;
  }
  SPNET_DEVICE float load_number(int offset, bool where) { return low(where ? *at<uint16_t>(offset) : 0u); }
  SPNET_DEVICE void store_zeros(int offset, bool where) {
    if (where) *at<uint4>(offset) = make_uint4(0, 0, 0, 0);
  }

  SPNET_DEVICE void load(uint32_t (&value)[4], int offset) {
    const uint4 unit = *at<uint4>(offset);
    value[0] = unit.x, value[1] = unit.y, value[2] = unit.z, value[3] = unit.w;
  }
  SPNET_DEVICE void load(float (&value)[4], int offset) { set(value, *at<float4>(offset)); }

  SPNET_DEVICE void load_matrices(uint32_t (&matrices)[4], int offset) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_ + offset)
                 : "memory");
  }

  // --- Global memory ---------------------------------------------------------------------------------------

  SPNET_DEVICE static float load_global(const float* from, int index) { return __ldg(from + index); }
  SPNET_DEVICE static void load_global(float (&value)[4], const float* from, int index) {
    set(value, __ldg(reinterpret_cast<const float4*>(from) + index));
  }
  SPNET_DEVICE static void store_global(float* to, int index, float value, bool where) {
    if (where) to[index] = value;
  }
  SPNET_DEVICE void store_byte(uint8_t* to, bool value) const {
    if (lane_ == 0) *to = value;
  }
  SPNET_DEVICE static uint32_t load_half(const void* from, int64_t index, bool where) {
    return where ? __ldg(static_cast<const unsigned short*>(from) + index) : 0u;
  }

  // --- Asynchronous copies of 16 bytes ---------------------------------------------------------------------

  SPNET_DEVICE void copy_async(int offset, const void* from, int index, bool where) {
    if (!where) return;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_ + offset),
                 "l"(static_cast<const uint4*>(from) + index)
                 : "memory");
  }
  SPNET_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kGroups>
  SPNET_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
  }
  SPNET_DEVICE void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

  // --- Arithmetic ------------------------------------------------------------------------------------------

  SPNET_DEVICE static float low(uint32_t pair) {
    if constexpr (kHalf) return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
    return __uint_as_float(pair << 16);
  }
  SPNET_DEVICE static float high(uint32_t pair) {
    if constexpr (kHalf) return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
    return __uint_as_float(pair & 0xffff0000u);
  }
  SPNET_DEVICE static uint32_t pack_relu(float low, float high) {  // keeps NaN
    uint32_t pair;
    if constexpr (kHalf) {
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
  }

  SPNET_DEVICE static void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kHalf) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;

  template <class T>
  SPNET_DEVICE static T* at(int offset) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(shared_memory) + offset);
  }
  SPNET_DEVICE static void set(float (&value)[4], float4 from) {
    value[0] = from.x, value[1] = from.y, value[2] = from.z, value[3] = from.w;
  }

  const int index_, lane_;
  const uint32_t shared_;
};

}  // namespace spnet::cuda
