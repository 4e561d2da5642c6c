// The model's kernels. instruction_sets.h includes this once per instruction set.

#include "interaction.h"
#include "mlp.h"

namespace robe {
namespace ROBE_ISA {

extern const Kernels kernels;
const Kernels kernels = {ROBE_ISA_NAME, interact, interact_grad, mlp};

}  // namespace ROBE_ISA
}  // namespace robe
