//! A compiled cascade on a device that has memory of its own: what `cuda` and `wgpu` share.
//!
//! Invariant: sizes are bound only where the cascade's facts over ranks hold, nothing is launched where those over scalars
//! do not, and scalars with a default need not be given.

use std::sync::Arc;

use einfall_ir::cascade::Cascade;
use einfall_ir::cascade::bind::{Bindings, Given, bind, check_facts};
use einfall_ir::mapping::Mapping;
use einfall_ir::tile::Plan;
use einfall_runtime::DeviceArguments;
use einfall_runtime::executable::{self, Executable, Loaded};

use crate::engine::{check_scalars, defaults};
use crate::lowering::Error;

/// A cascade or plan compiled for a device that holds its code as a `C`: serves every size of its symbolic ranks.
#[derive(Debug)]
pub struct Kernel<C> {
    pub(crate) cascade: Option<Cascade>,
    pub(crate) plan: Plan,
    pub(crate) mapping: Mapping,
    pub(crate) executable: Arc<Executable<C>>,
}

impl<C> Clone for Kernel<C> {
    fn clone(&self) -> Kernel<C> {
        let Kernel { cascade, plan, mapping, executable } = self;
        let executable = Arc::clone(executable);
        Kernel { cascade: cascade.clone(), plan: plan.clone(), mapping: mapping.clone(), executable }
    }
}

impl<C: Loaded> Kernel<C> {
    /// Its kernels over tiles.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How it is mapped.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The loaded code.
    pub fn executable(&self) -> &Arc<Executable<C>> {
        &self.executable
    }

    /// Fixes the sizes by rank name; fixed ranks need not be given. Facts of a cascade over ranks are checked.
    ///
    /// # Errors
    /// [`Error::Bind`] for sizes that do not fit or facts that do not hold, [`Error::Runtime`] for sizes that the
    /// kernels do not take.
    pub fn bind<S: AsRef<str>>(&self, sizes: &[(S, u64)]) -> Result<Bound<C>, Error> {
        let Some(cascade) = &self.cascade else {
            return Ok(Bound { runtime: self.executable.bind(sizes)?, facts: None, defaults: Vec::new() });
        };
        let sizes = sizes.iter().map(|(n, v)| (n.as_ref().to_owned(), *v)).collect();
        let bindings = bind(cascade, &Given { sizes, ..Given::default() })?;
        check_facts(cascade, &bindings, &[])?;
        let ranks = cascade.ranks.iter().zip(&bindings.extents);
        let sizes: Vec<(&str, u64)> = ranks.map(|((_, r), n)| (r.name.as_str(), *n)).collect();
        let (runtime, defaults) = (self.executable.bind(&sizes)?, defaults(cascade, &bindings)?);
        Ok(Bound { runtime, facts: Some((cascade.clone(), bindings)), defaults })
    }
}

/// A compiled cascade or plan at fixed sizes.
#[derive(Debug)]
pub struct Bound<C: Loaded> {
    pub(crate) runtime: executable::Bound<C>,
    /// For the facts over scalars, which code relies on; none of a plan, which has none.
    facts: Option<(Cascade, Bindings)>,
    /// Scalars the caller need not give.
    defaults: Vec<(String, f64)>,
}

impl<C: Loaded> Bound<C> {
    /// The run time's view: array specifications, kernels, arrays as the kernels want them.
    pub fn runtime(&self) -> &executable::Bound<C> {
        &self.runtime
    }

    /// Arguments with the defaults of scalars that are not among them.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact.
    pub(crate) fn with_defaults<'a, A: Clone>(
        &'a self,
        mut arguments: DeviceArguments<'a, A>,
    ) -> Result<DeviceArguments<'a, A>, Error> {
        for (name, value) in &self.defaults {
            if !arguments.gives(name) {
                arguments = arguments.scalar(name, *value);
            }
        }
        self.check(arguments.scalars())?;
        Ok(arguments)
    }

    /// Scalars with the defaults of those that are not among them.
    ///
    /// # Errors
    /// [`Error::Bind`] where a scalar breaks a fact.
    pub(crate) fn all_scalars<'a>(&'a self, given: &[(&'a str, f64)]) -> Result<Vec<(&'a str, f64)>, Error> {
        let missing = self.defaults.iter().filter(|(n, _)| given.iter().all(|(s, _)| s != n));
        let all: Vec<_> = given.iter().copied().chain(missing.map(|(n, v)| (n.as_str(), *v))).collect();
        self.check(&all)?;
        Ok(all)
    }

    fn check(&self, scalars: &[(&str, f64)]) -> Result<(), Error> {
        self.facts.as_ref().map_or(Ok(()), |(c, b)| check_scalars(c, b, scalars))
    }
}
