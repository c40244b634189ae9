//! What the tests share: the device, sizes, arrays, the float64 evaluator.

use cubecl::Device;
use cubecl::wgpu::WgpuDeviceKind;
use einfall::ir::array::Array as Values;
use einfall::ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall::ir::cascade::{Cascade, eval, parse};
use einfall::ir::tolerance::inputs::{Variant, random};
use einfall::ir::tolerance::{Expected, expect, poison};
use einfall::runtime::HostArray;
use einfall_cubecl::{Array, Call, Client, Program};

/// Lavapipe; none, and said, where it is not installed.
pub fn device() -> Option<Device> {
    let folder = std::fs::read_dir("/usr/share/vulkan/icd.d").ok()?;
    if !folder.flatten().any(|f| f.file_name().to_string_lossy().starts_with("lvp_icd")) {
        eprintln!("SKIPPED: no lavapipe (`make vulkan`)");
        return None;
    }
    Some(Device::wgpu(WgpuDeviceKind::Cpu).expect("lavapipe is a device"))
}

/// Its client.
pub fn lavapipe() -> Option<Client> {
    device().map(|d| d.client())
}

/// The first cascade of a text.
pub fn cascade(text: &str) -> Cascade {
    parse(text).unwrap_or_else(|d| panic!("{d:?}")).cascades.remove(0)
}

/// A cascade of the library, the file's last.
pub fn library(name: &str) -> Cascade {
    let text = einfall_kernels::source(name).expect("a library file");
    parse(text).expect("library files parse").cascades.pop().expect("a cascade")
}

/// Numbers from a seed.
pub fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33
}

/// Small extents, primes among them, under which the cascade's facts hold.
pub fn draw(c: &Cascade, state: &mut u64) -> Bindings {
    const EXTENTS: [u64; 9] = [1, 2, 3, 5, 8, 13, 17, 32, 33];
    let free = |b: &Bindings| b.extents.iter().fold(1u64, |n, e| n.saturating_mul(*e)) < 20_000;
    (0..2000)
        .find_map(|_| {
            let ranks = c.ranks.iter().filter(|(_, r)| r.fixed.is_none());
            let sizes = ranks.map(|(_, r)| (r.name.clone(), EXTENTS[next(state) as usize % EXTENTS.len()])).collect();
            let b = bind(c, &Given { sizes, ..Given::default() }).ok()?;
            (check_facts(c, &b, &[]).is_ok() && free(&b)).then_some(b)
        })
        .expect("sizes that satisfy the facts")
}

/// Sizes by name.
pub fn sized(c: &Cascade, sizes: &[(&str, u64)]) -> Bindings {
    let sizes = sizes.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
    bind(c, &Given { sizes, ..Given::default() }).expect("the sizes fit")
}

/// A case: inputs in the order of the parameters, and what to expect.
pub struct Case {
    pub cascade: Cascade,
    pub bindings: Bindings,
    pub inputs: Vec<Values>,
    pub expected: Vec<Expected>,
}

impl Case {
    /// Random inputs at sizes.
    pub fn new(cascade: &Cascade, bindings: Bindings, seed: u64) -> Case {
        let inputs = random(cascade, &bindings, seed, Variant::Small).expect("inputs");
        let expected = expect(cascade, &bindings, &inputs, &eval::Options::default()).expect("the evaluator runs");
        Case { cascade: cascade.clone(), bindings, inputs, expected }
    }

    /// A call on arrays of their own, outputs full of poison.
    pub fn call(&self, client: &Client) -> Call {
        let put = |v: &Values| {
            let host = HostArray::from_values(v).expect("an array");
            Array::from_bytes(client, v.dtype, &v.dims, host.bytes()).expect("an array")
        };
        let mut call = Call::new();
        let c = &self.cascade;
        for (p, v) in c.params.iter().zip(&self.inputs) {
            let name = &c.tensors[*p].name;
            call = if v.dims.is_empty() { call.scalar(name, v.data[0]) } else { call.array(name, put(v)) };
        }
        for (o, x) in c.outputs.iter().zip(&self.expected) {
            call = call.output(&o.name, put(&Values::from_fn(x.dtype, &x.dims, |_| poison(x.dtype))));
        }
        for ((_, r), n) in c.ranks.iter().zip(&self.bindings.extents) {
            call = call.size(&r.name, *n);
        }
        call
    }

    /// Whether results are within the computed tolerance.
    pub fn compare(&self, client: &Client, results: &[(String, Array)]) -> Result<(), String> {
        for x in &self.expected {
            let (_, array) = results.iter().find(|(n, _)| *n == x.name).ok_or(format!("`{}` did not come", x.name))?;
            let bytes = array.to_bytes(client).map_err(|e| e.to_string())?;
            let host = HostArray::from_bytes(array.dtype(), array.shape(), &bytes).map_err(|e| e.to_string())?;
            x.compare(&host.to_values().map_err(|e| e.to_string())?.data).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Runs a program and compares.
    pub fn run(&self, program: &Program) -> Result<(), String> {
        let results = program.launch(self.call(program.client())).map_err(|e| e.to_string())?;
        self.compare(program.client(), &results)
    }
}
