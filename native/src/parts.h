// Work on several threads, for calls that are not ONNX Runtime's.
#pragma once

#include <cstdint>
#include <functional>

namespace lorac {

// Calls work(i) for every i below `parts`, on this thread and on at most `threads` - 1 others, which take parts as they
// are free: one that is late takes none, and is not waited for.
//
// The others live as long as the process and wait for the next call: to start one takes as long as to write a weight.
void RunParts(int64_t parts, int64_t threads, const std::function<void(int64_t)>& work);

}  // namespace lorac
