// What racecheck does not follow: a value handed over behind an mbarrier at which one thread arrives for its
// warpgroup, as in CUTLASS, Triton and the kernels here. Both kernels are right, and do the same.
//
//     nvcc -arch=sm_90a -o handover tests/handover.cu
//     compute-sanitizer --tool racecheck ./handover all   # no hazards
//     compute-sanitizer --tool racecheck ./handover one   # hazards are reported, which there are not
#include <cstdint>
#include <cstdio>
#include <cstring>

__device__ uint32_t address(void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

template <bool ALL>
__global__ void hand_over(float* out) {
  __shared__ float values[128];
  __shared__ uint64_t ready;
  int thread = threadIdx.x;
  if (thread == 0)
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(&ready)), "r"(ALL ? 128 : 1) : "memory");
  __syncthreads();
  if (thread < 128) {
    values[thread] = 2.0f * thread;
    if (!ALL) asm volatile("bar.sync 1, 128;" ::: "memory");  // orders what the warpgroup wrote
    if (ALL || thread == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(&ready)) : "memory");
  } else {
    asm volatile(
        "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared.b64 done, [%0], 0; @!done bra AGAIN; }" ::"r"(
            address(&ready))
        : "memory");
    out[thread - 128] = values[(thread + 37) % 128];
  }
}

int main(int argc, char** argv) {
  float *out, got[128];
  cudaMalloc(&out, sizeof(got));
  if (argc > 1 && !strcmp(argv[1], "all"))
    hand_over<true><<<1, 256>>>(out);
  else
    hand_over<false><<<1, 256>>>(out);
  cudaMemcpy(got, out, sizeof(got), cudaMemcpyDeviceToHost);
  for (int i = 0; i < 128; ++i)
    if (got[i] != 2.0f * ((i + 37) % 128)) return printf("wrong\n"), 1;
  return printf("right\n"), cudaGetLastError() != cudaSuccess;
}
