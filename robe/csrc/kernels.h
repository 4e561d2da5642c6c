// The kernels of the array. instruction_sets.h includes this once per instruction set, each time with another ROBE_ISA, the
// namespace of that set. What is here is plain C++ that the compiler vectorises for it. Products are never fused with sums
// (-ffp-contract=off), so every set gives the same bits.

#include "numbers.h"
#include "hash.h"
#include "blocks.h"
#include "tiles.h"
#include "lookup.h"
#include "bag.h"
#include "forward.h"
#include "gradient.h"
#include "update.h"

namespace robe {
namespace ROBE_ISA {

extern const Kernels kernels;
const Kernels kernels = {ROBE_ISA_NAME, read, weights_gradient, collect, sort, prefetch, gradient, update, sums};

}  // namespace ROBE_ISA
}  // namespace robe
