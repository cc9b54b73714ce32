// Arithmetic that is rounded operation by operation, as numpy's is: no fused multiply-adds, no reordering.
#pragma once

#include <cfloat>

#ifdef __FAST_MATH__
#error "fastddim: -ffast-math and -Ofast change the bits of noise and schedules; leave them out here"
#endif
#if FLT_EVAL_METHOD != 0
#error "fastddim: float arithmetic in a wider type changes the bits of the noise; on x86 pass -msse2 -mfpmath=sse"
#endif

// Around functions (GCC), and as the first statement of each (Clang, unless -ffp-contract=fast is passed); other
// compilers need their own option.
#if defined(__clang__)
#define FASTDDIM_EXACT_BEGIN
#define FASTDDIM_EXACT_END
#define FASTDDIM_EXACT _Pragma("clang fp contract(off)")
#elif defined(__GNUC__)
#define FASTDDIM_EXACT_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"fp-contract=off\")")
#define FASTDDIM_EXACT_END _Pragma("GCC pop_options")
#define FASTDDIM_EXACT
#else
#define FASTDDIM_EXACT_BEGIN
#define FASTDDIM_EXACT_END
#define FASTDDIM_EXACT
#endif
