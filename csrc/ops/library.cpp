// Schemas of all ops. They are part of the public interface: docs/design.md explains them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gplws, m) {
  m.def(
      "group_pointwise_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? pointwise_weight, "
      "Tensor? pointwise_bias, Tensor? residual, int groups, int stride, bool relu, "
      "bool pointwise_relu, bool residual_relu) -> Tensor");
  m.def(
      "group_pointwise_conv3d.out(Tensor x, Tensor weight, Tensor? bias, Tensor? pointwise_weight, "
      "Tensor? pointwise_bias, Tensor? residual, int groups, int stride, bool relu, "
      "bool pointwise_relu, bool residual_relu, Tensor(a!) out) -> ()");
  m.def(
      "group_pointwise_conv3d.packed(Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? pointwise_weight, Tensor? pointwise_bias, Tensor packed, int groups, int stride, "
      "bool relu, bool pointwise_relu, Tensor(a!) out) -> ()");
  m.def(
      "pack_group_pointwise_conv3d(Tensor weight, Tensor? bias, Tensor? pointwise_weight, "
      "Tensor? pointwise_bias, int groups, int stride) -> Tensor");
  m.def("up_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int groups) -> Tensor");
  m.def(
      "up_conv3d.out(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int groups, "
      "Tensor(a!) out) -> ()");
  m.def(
      "conv3d_input_gradient(Tensor grad, Tensor weight, int groups, bool even_height, "
      "bool even_width) -> Tensor");
  m.def("conv3d_weight_gradient(Tensor x, Tensor grad, int groups, int stride) -> Tensor");
  m.def(
      "focus_search(Tensor volume, Tensor focus_positions, int groups, int refinement, int radius, "
      "bool log_scale) -> (Tensor depth, Tensor index, Tensor peak, Tensor confidence)");
  m.def(
      "focus_search.out(Tensor volume, Tensor focus_positions, int groups, int refinement, "
      "int radius, bool log_scale, Tensor(a!) depth, Tensor(b!) index, Tensor(c!) peak, "
      "Tensor(d!) confidence) -> ()");
  m.def("spline_smooth(Tensor images, int spacing) -> Tensor");
  m.def("spline_smooth.out(Tensor images, int spacing, Tensor(a!) out) -> ()");
  m.def("symmetric_filter(Tensor images, Tensor weights) -> Tensor");
  m.def("second_differences(Tensor images, Tensor shifts) -> Tensor");
  m.def("smooth_surface(Tensor depth, float limit) -> Tensor");
  m.def(
      "sample_surface(Tensor responses, Tensor surface, int spacing) -> "
      "(Tensor values, Tensor distances, Tensor weights)");
  m.def(
      "fit_peak(Tensor values, Tensor? middle, Tensor? distances, Tensor? weights) -> "
      "(Tensor vertex, Tensor concave)");
  m.def(
      "regularise_surface(Tensor depth, Tensor confidence, Tensor guide, float strength, "
      "float data_scale, float smoothness_scale, float guide_scale, int iterations) -> Tensor");
}
