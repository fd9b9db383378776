//! Addresses of clients: which count as one, and which networks are trusted to name others.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// Addresses that count as one client: an IPv4 address, or a /64 of IPv6, which is what one subscriber gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Group {
    /// One address.
    V4(Ipv4Addr),
    /// The first 64 bits.
    V6(u64),
}

impl Group {
    /// The group of an address; an IPv4 address that is written as IPv6 is one of IPv4.
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let bits = address.to_bits() >> 64;
                #[allow(clippy::cast_possible_truncation)] // 64 bits are left
                let first = bits as u64;
                Self::V6(first)
            }
        }
    }
}

/// A network in CIDR notation; an address alone is a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    base: IpAddr,
    prefix: u8,
}

/// What is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no network: write an address, or one with the length of its prefix, 10.0.0.0/8")]
pub struct NetworkError(String);

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let wrong = || NetworkError(text.to_owned());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let base: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => most,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().map_err(|_| wrong())?
            }
            Some(_) => return Err(wrong()),
        };
        if prefix > most {
            return Err(wrong());
        }
        Ok(Self { base, prefix })
    }
}

impl Network {
    /// Whether the address lies in it.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        match (self.base.to_canonical(), address.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                // A mapped base has 96 bits more.
                let prefix = if self.base.is_ipv6() {
                    self.prefix.saturating_sub(96)
                } else {
                    self.prefix
                };
                let differing = base.to_bits() ^ address.to_bits();
                prefix == 0 || differing >> (32 - u32::from(prefix)) == 0
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                let differing = base.to_bits() ^ address.to_bits();
                self.prefix == 0 || differing >> (128 - u32::from(self.prefix)) == 0
            }
            _ => false,
        }
    }
}

/// The client of a request that came through proxies: from the right, the first address that is none of `trusted`.
///
/// `peer`: who connected. `forwarded`: values of `X-Forwarded-For` in the order in which they came. An entry that is no
/// address ends the search: what is left of it was written by somebody we do not know.
pub(crate) fn client<'a>(
    peer: IpAddr,
    forwarded: impl DoubleEndedIterator<Item = &'a str>,
    trusted: &[Network],
) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|network| network.contains(address));
    let mut client = peer;
    for entry in forwarded.rev().flat_map(|value| value.rsplit(',')) {
        if !is_trusted(client) {
            break;
        }
        let Some(address) = parse(entry.trim()) else {
            break;
        };
        client = address;
    }
    client
}

/// An address as proxies write it: alone, in brackets, with a port.
fn parse(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    if let Some(rest) = text.strip_prefix('[') {
        return rest.split_once(']')?.0.parse().ok();
    }
    text.split_once(':')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_subscriber_of_ipv6_is_one_client() {
        assert_eq!(
            Group::of(ip("2001:db8::1")),
            Group::of(ip("2001:db8::ffff:1"))
        );
        assert_ne!(
            Group::of(ip("2001:db8::1")),
            Group::of(ip("2001:db8:0:1::1"))
        );
        assert_eq!(Group::of(ip("::ffff:10.0.0.1")), Group::of(ip("10.0.0.1")));
        assert_ne!(Group::of(ip("10.0.0.2")), Group::of(ip("10.0.0.1")));
    }

    #[test]
    fn networks() {
        let network: Network = "10.1.0.0/16".parse().unwrap();
        assert!(network.contains(ip("10.1.255.1")));
        assert!(network.contains(ip("::ffff:10.1.0.1")));
        assert!(!network.contains(ip("10.2.0.1")));
        assert!(!network.contains(ip("::1")));
        assert!(
            "0.0.0.0/0"
                .parse::<Network>()
                .unwrap()
                .contains(ip("1.2.3.4"))
        );
        assert!("::/0".parse::<Network>().unwrap().contains(ip("fe80::1")));
        assert!(
            !"127.0.0.1"
                .parse::<Network>()
                .unwrap()
                .contains(ip("127.0.0.2"))
        );
        for wrong in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "a",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "::/129",
        ] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_client_is_the_last_that_no_trusted_proxy_is() {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()];
        let of = |peer: &str, values: &[&str]| client(ip(peer), values.iter().copied(), &trusted);
        assert_eq!(
            of("1.1.1.1", &["9.9.9.9"]),
            ip("1.1.1.1"),
            "nobody asked it"
        );
        assert_eq!(of("10.0.0.1", &["9.9.9.9"]), ip("9.9.9.9"));
        assert_eq!(
            of("10.0.0.1", &["6.6.6.6, 9.9.9.9"]),
            ip("9.9.9.9"),
            "the rest is the client's word"
        );
        assert_eq!(
            of("10.0.0.1", &["6.6.6.6", "9.9.9.9, 10.0.0.2"]),
            ip("9.9.9.9")
        );
        assert_eq!(of("::1", &["[2001:db8::1]:443"]), ip("2001:db8::1"));
        assert_eq!(of("10.0.0.1", &["9.9.9.9:1234"]), ip("9.9.9.9"));
        assert_eq!(of("10.0.0.1", &["unknown"]), ip("10.0.0.1"));
        assert_eq!(
            of("10.0.0.1", &["9.9.9.9, unknown, 10.0.0.2"]),
            ip("10.0.0.2")
        );
        assert_eq!(of("10.0.0.1", &[]), ip("10.0.0.1"));
    }

    proptest! {
        /// Whatever a client writes itself, what the trusted proxy adds on the right decides.
        #[test]
        fn a_client_cannot_choose_its_address(written in "[0-9a-f:., \\[\\]]{0,60}", real: [u8; 4]) {
            let real = IpAddr::from(real);
            let trusted = ["127.0.0.1".parse().unwrap()];
            prop_assume!(!trusted.iter().any(|network: &Network| network.contains(real)));
            let value = format!("{written}, {real}");
            prop_assert_eq!(client(ip("127.0.0.1"), [value.as_str()].into_iter(), &trusted), real);
        }
    }
}
