// Bindings of what offloading needs: experts in slots, and the reader that fills them.
#pragma once

#include <nanobind/nanobind.h>

void bind_offload(nanobind::module_& m);
