#pragma once

#include <nanobind/nanobind.h>

namespace glmlocal {

void bind_ops(nanobind::module_& m);

}  // namespace glmlocal
