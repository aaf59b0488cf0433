#pragma once
#include "epilogue.cuh"
namespace dtq {
template <class Source>
int run_wgmma(const GemmArgs& p, Stream stream) { return kUnsupported; }
}
