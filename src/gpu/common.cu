// What the kernels of decoder and text encoder share; it stands in front of their source.
//   BF16  1: numbers that are multiplied are bf16 (`T`), 0: f32

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned char u8;

#if BF16
typedef u16 T;
#else
typedef float T;
#endif

#define MINUS_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float up(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float up(float x) { return x; }
__device__ __forceinline__ void put(u16* to, float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    *to = bits;
}
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
