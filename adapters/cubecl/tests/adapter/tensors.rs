//! Burn's tensors in and out: a model whose attention is swapped, tensors that are not dense, wrong tensors.

use crate::common::{cascade, device, library, sized};
use burn::tensor::{DType as BurnType, Distribution, Tensor};
use einfall::CompileOptions;
use einfall::ir::array::Array as Values;
use einfall::ir::cascade::eval;
use einfall::ir::dtype::DType;
use einfall::ir::tolerance::expect;
use einfall_cubecl::{Array, Call, Program, Tuned};

/// The values of a tensor, as the evaluator takes them.
fn values<const D: usize>(tensor: &Tensor<D>) -> Values {
    let data = tensor.clone().into_data();
    let dims: Vec<u64> = tensor.dims().iter().map(|n| *n as u64).collect();
    let numbers = data.iter::<f32>().map(f64::from).collect();
    Values::new(DType::F32, &dims, numbers).expect("as many as the shape has")
}

/// The library's attention in f32, and Burn's, on tensors whose heads are a swapped dimension.
#[test]
fn attention_on_tensors_agrees_with_the_evaluator_and_with_burn() {
    let Some(place) = device() else { return };
    let (client, device) = (place.client(), burn::tensor::Device::new(place.clone()));
    let text = einfall_kernels::source("attention_full").expect("a library file").replace("bf16", "f32");
    let c = cascade(&text);
    let program = Program::compile(&client, &c, &CompileOptions::default()).expect("compiles");
    // [B,T,H,E] as [B,H,T,E].
    let heads = |t: usize| Tensor::<4>::random([2, t, 3, 16], Distribution::Normal(0.0, 1.0), &device).swap_dims(1, 2);
    let (q, k, v) = (heads(19), heads(33), heads(33));
    let call = Call::new()
        .array("Q", Array::from_tensor(q.clone()).expect("a tensor"))
        .array("K", Array::from_tensor(k.clone()).expect("a tensor"))
        .array("V", Array::from_tensor(v.clone()).expect("a tensor"));
    let results = program.launch(call).expect("launches");
    let ours: Tensor<4> = results[0].1.clone().into_tensor(&place).expect("a tensor");
    let b = sized(&c, &[("B", 2), ("H", 3), ("M", 19), ("N", 33), ("E", 16), ("F", 16)]);
    let scale = Values::scalar(DType::F32, DType::F32.round(0.25));
    let inputs = [values(&q), values(&k), values(&v), scale];
    let expected = expect(&c, &b, &inputs, &eval::Options::default()).expect("the evaluator runs");
    expected[0].compare(&values(&ours).data).expect("the launch agrees");
    let scores = q.matmul(k.transpose()).mul_scalar(0.25);
    let burns = burn::tensor::activation::softmax(scores, 3).matmul(v);
    expected[0].compare(&values(&burns).data).expect("Burn's agrees");
}

/// A slice of a tensor's columns, which Burn keeps where it is: its rows are padded by the other columns.
#[test]
fn a_slice_is_updated_in_place() {
    let Some(place) = device() else { return };
    let (client, device) = (place.client(), burn::tensor::Device::new(place.clone()));
    let c = cascade("cascade twice[M, N](inout a: f32[M, N]) -> () { a[m,n] = 2.0 * a[m,n] }");
    let tuned = |k: u32| {
        let one = |_| Program::compile(&client, &c, &CompileOptions::default()).expect("compiles");
        Tuned::new((0..k).map(|i| (i.to_string(), one(i))).collect()).expect("programs")
    };
    let whole = || Tensor::<1, burn::tensor::Int>::arange(0..7 * 192, &device).float().reshape([7, 192]);
    for k in [1, 2] {
        let slice = Array::from_tensor(whole().slice([0..7, 64..128])).expect("a tensor");
        assert_eq!((slice.shape(), slice.strides()), (&[7, 64][..], &[192, 1][..]), "a slice is no copy");
        let results = tuned(k).launch(Call::new().array("a", slice)).expect("launches");
        assert_eq!(results[0].1.strides(), [192, 1]);
        let twice: Tensor<2> = results[0].1.clone().into_tensor(&place).expect("a tensor");
        let expected = whole().slice([0..7, 64..128]).mul_scalar(2.0);
        assert_eq!(values(&twice).data, values(&expected).data);
    }
}

#[test]
fn wrong_tensors_are_refused_by_name() {
    let Some(place) = device() else { return };
    let (client, device) = (place.client(), burn::tensor::Device::new(place.clone()));
    let program = Program::compile(&client, &library("softmax"), &CompileOptions::default()).expect("compiles");
    let x = Tensor::<3>::zeros([2, 3, 4], &device);
    let array = Array::from_tensor(x).expect("a tensor");
    let parameter = {
        let c = library("softmax");
        c.tensors[c.params[0]].name.clone()
    };
    let said = program.launch(Call::new().array(&parameter, array.clone())).expect_err("three dimensions").to_string();
    assert!(said.contains(&format!("`{parameter}`")), "{said}");
    let said = array.into_tensor::<2>(&place).expect_err("three dimensions").to_string();
    assert!(said.contains("has 3 dimensions, not 2"), "{said}");
    let half = Tensor::<2>::zeros([2, 3], &device).cast(BurnType::F16);
    let half = Array::from_tensor(half).expect("a tensor");
    assert_eq!(half.dtype(), DType::F16);
    let said = program.launch(Call::new().array(&parameter, half.clone())).expect_err("another type").to_string();
    assert!(said.contains(&format!("`{parameter}`")) && said.contains("f16"), "{said}");
    let said = half.into_int_tensor::<2>(&place).expect_err("no integers").to_string();
    assert!(said.contains("f16"), "{said}");
}
