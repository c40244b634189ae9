//! Arrays with their element type, dimensions and fixed extents in the type.
//!
//! A dimension is [`Any`] or [`Is<N>`](Is); a tuple of them is a [`Shape`]. Slices of arrays convert where their extents
//! are those of the type, so a wrong one is refused when compiling; [`Input::new`] takes a flat slice and the extents
//! that are not fixed are checked at launch like all others. Invariant: an array is dense and of the type's extents.

use std::marker::PhantomData;

use einfall_ir::dtype::DType;

use crate::array::{ArrayError, Element, View, ViewMut};

/// A dimension of any extent.
#[derive(Clone, Copy, Debug)]
pub struct Any;

/// A dimension of `N` coordinates.
#[derive(Clone, Copy, Debug)]
pub struct Is<const N: usize>;

/// A dimension.
pub trait Extent {
    /// Its extent, where the type fixes it.
    const FIXED: Option<usize>;
}

impl Extent for Any {
    const FIXED: Option<usize> = None;
}

impl<const N: usize> Extent for Is<N> {
    const FIXED: Option<usize> = Some(N);
}

/// The dimensions of an array, outermost first.
pub trait Shape {
    /// One extent per dimension.
    type Extents: AsRef<[usize]>;
    /// The fixed ones.
    const FIXED: &'static [Option<usize>];
}

macro_rules! shapes {
    ($($n:literal: $($d:ident)*;)*) => { $(
        impl<$($d: Extent),*> Shape for ($($d,)*) {
            type Extents = [usize; $n];
            const FIXED: &'static [Option<usize>] = &[$($d::FIXED),*];
        }
    )* };
}
shapes! {
    0: ;
    1: A;
    2: A B;
    3: A B C;
    4: A B C D;
    5: A B C D E;
    6: A B C D E F;
    7: A B C D E F G;
    8: A B C D E F G H;
}

/// An array to read.
#[derive(Debug)]
pub struct Input<'a, T, S> {
    view: View<'a>,
    of: PhantomData<(T, S)>,
}

/// An array to write, or to update in place.
#[derive(Debug)]
pub struct Output<'a, T, S> {
    view: ViewMut<'a>,
    of: PhantomData<(T, S)>,
}

/// The extents as the run time takes them, if they are those of the type.
fn extents<S: Shape>(dtype: DType, given: &S::Extents) -> Result<Vec<u64>, ArrayError> {
    let given: Vec<u64> = given.as_ref().iter().map(|n| *n as u64).collect();
    let fixed: Vec<Option<u64>> = S::FIXED.iter().map(|n| n.map(|n| n as u64)).collect();
    if fixed.iter().zip(&given).any(|(f, n)| f.is_some_and(|f| f != *n)) {
        return Err(ArrayError::Extents { dtype, fixed, found: given });
    }
    Ok(given)
}

impl<'a, T: Element, S: Shape> Input<'a, T, S> {
    /// The elements in row-major order, with their extents.
    ///
    /// # Errors
    /// [`ArrayError::Extents`] for an extent that the type fixes otherwise, [`ArrayError::Length`] for another number
    /// of elements.
    pub fn new(elements: &'a [T], shape: S::Extents) -> Result<Self, ArrayError> {
        let view = View::dense(elements, &extents::<S>(T::DTYPE, &shape)?)?;
        Ok(Input { view, of: PhantomData })
    }

    /// The untyped view.
    pub fn view(self) -> View<'a> {
        self.view
    }
}

impl<'a, T: Element, S: Shape> Output<'a, T, S> {
    /// The elements in row-major order, with their extents.
    ///
    /// # Errors
    /// As [`Input::new`].
    pub fn new(elements: &'a mut [T], shape: S::Extents) -> Result<Self, ArrayError> {
        let view = ViewMut::dense(elements, &extents::<S>(T::DTYPE, &shape)?)?;
        Ok(Output { view, of: PhantomData })
    }

    /// The untyped view.
    pub fn view(self) -> ViewMut<'a> {
        self.view
    }
}

/// Slices and arrays convert to shapes that allow their extents. `flat` and `flat_mut` give all elements of `s`.
macro_rules! converts {
    ($([$($n:ident),*] $from:ty, |$s:ident| $flat:expr, $flat_mut:expr, $extents:expr => $($shape:ty),+;)*) => { $( converts!(
        @each ($($n),*) $from, $s, $flat, $flat_mut, $extents, [$($shape),+]
    ); )* };
    (@each $n:tt $from:ty, $s:ident, $flat:expr, $flat_mut:expr, $extents:expr, [$($shape:ty),+]) => { $( converts!(
        @one $n $from, $s, $flat, $flat_mut, $extents, $shape
    ); )+ };
    (@one ($($n:ident),*) $from:ty, $s:ident, $flat:expr, $flat_mut:expr, $extents:expr, $shape:ty) => {
        impl<'a, T: Element, $(const $n: usize),*> From<&'a $from> for Input<'a, T, $shape> {
            fn from($s: &'a $from) -> Self {
                Input::new($flat, $extents).expect("the type has the extents of the slice")
            }
        }
        impl<'a, T: Element, $(const $n: usize),*> From<&'a mut $from> for Output<'a, T, $shape> {
            fn from($s: &'a mut $from) -> Self {
                let extents = $extents;
                Output::new($flat_mut, extents).expect("the type has the extents of the slice")
            }
        }
    };
}
converts! {
    [] T, |s| std::slice::from_ref(s), std::slice::from_mut(s), [] => ();
    [] [T], |s| s, s, [s.len()] => (Any,);
    [N] [T; N], |s| s, s, [N] => (Is<N>,);
    [N] [[T; N]], |s| s.as_flattened(), s.as_flattened_mut(), [s.len(), N] => (Any, Is<N>), (Any, Any);
    [M, N] [[T; N]; M], |s| s.as_flattened(), s.as_flattened_mut(), [M, N] => (Is<M>, Is<N>);
    [M, N] [[[T; N]; M]], |s| s.as_flattened().as_flattened(), s.as_flattened_mut().as_flattened_mut(), [s.len(), M, N]
        => (Any, Is<M>, Is<N>), (Any, Any, Is<N>), (Any, Any, Any);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_become_arrays_of_their_extents() {
        let rows = [[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]];
        let fixed: Input<f32, (Any, Is<3>)> = (&rows[..]).into();
        assert_eq!(fixed.view().shape(), [2, 3]);
        let free: Input<f32, (Any, Any)> = (&rows[..]).into();
        assert_eq!(free.view().shape(), [2, 3]);
        let both: Input<f32, (Is<2>, Is<3>)> = (&rows).into();
        assert_eq!(both.view().shape(), [2, 3]);
        let (mut one, mut cube) = (1i32, [[[0u8; 2]; 3]; 4]);
        assert_eq!(Output::<i32, ()>::from(&mut one).view().as_view().shape(), [0u64; 0]);
        assert_eq!(Output::<u8, (Any, Is<3>, Is<2>)>::from(&mut cube[..]).view().as_view().shape(), [4, 3, 2]);
    }

    #[test]
    fn flat_slices_are_checked_against_the_type() {
        let data = [0f32; 12];
        assert!(Input::<f32, (Any, Is<4>)>::new(&data, [3, 4]).is_ok());
        let wrong = Input::<f32, (Any, Is<4>)>::new(&data, [4, 3]).unwrap_err();
        assert_eq!(wrong, ArrayError::Extents { dtype: DType::F32, fixed: vec![None, Some(4)], found: vec![4, 3] });
        assert!(matches!(Input::<f32, (Any, Any)>::new(&data, [3, 5]), Err(ArrayError::Length { .. })));
    }
}
