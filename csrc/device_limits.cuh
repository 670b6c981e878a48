// What kernels may count on, for the code that is compiled for a device and the code that is not.
#pragma once

namespace isomerge {

inline constexpr int kMaxSharedBytes = 163 * 1024;  // per block, as sm_80 gives it; 8.6, 8.9 and 12.0 give 99 KB

}  // namespace isomerge
