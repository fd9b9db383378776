//! PROXY protocol v2, as haproxy's proxy-protocol.txt §2.2 has it: who the client of a proxy is.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tokio::io::{AsyncRead, AsyncReadExt};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Addresses take 36 bytes at most; the rest are notes that nobody here reads.
const LONGEST: usize = 1024;

/// Reads the header, and nothing behind it. `None`: the proxy speaks for itself, or for somebody without an address.
///
/// Fails when there is no such header.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let wrong = |why: &str| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("PROXY protocol v2: {why}"),
        )
    };
    let mut head = [0; 16];
    stream.read_exact(&mut head).await?;
    let [signature @ .., version, family, high, low] = head;
    if signature != *SIGNATURE || version >> 4 != 2 {
        return Err(wrong("the connection does not begin with it"));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > LONGEST {
        return Err(wrong("the header is too long"));
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    match version & 15 {
        0 => return Ok(None),
        1 => {}
        _ => return Err(wrong("an unknown command")),
    }
    let short = || wrong("the addresses are cut off");
    match family {
        0x11 => {
            let bytes: [u8; 4] = rest
                .get(..4)
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(short)?;
            Ok(Some(IpAddr::V4(Ipv4Addr::from(bytes))))
        }
        0x21 => {
            let bytes: [u8; 16] = rest
                .get(..16)
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(short)?;
            Ok(Some(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn header(version: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([version, family]);
        bytes.extend(u16::try_from(addresses.len()).unwrap().to_be_bytes());
        bytes.extend(addresses);
        bytes
    }

    async fn of(bytes: Vec<u8>) -> io::Result<Option<IpAddr>> {
        let mut input = bytes.as_slice();
        let found = read(&mut input).await?;
        assert_eq!(input, b"rest", "nothing behind it is read");
        Ok(found)
    }

    #[tokio::test]
    async fn headers() {
        let with_rest = |mut bytes: Vec<u8>| {
            bytes.extend(b"rest");
            bytes
        };
        let v4 = [
            203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x34, 1, 187, 3, 0, 4, 0, 0, 0, 0,
        ];
        assert_eq!(
            of(with_rest(header(0x21, 0x11, &v4))).await.unwrap(),
            Some("203.0.113.7".parse().unwrap())
        );
        let mut v6 = [0; 36];
        v6[..4].copy_from_slice(&[0x20, 1, 0xd, 0xb8]);
        assert_eq!(
            of(with_rest(header(0x21, 0x21, &v6))).await.unwrap(),
            Some("2001:db8::".parse().unwrap())
        );
        assert_eq!(
            of(with_rest(header(0x20, 0, &[]))).await.unwrap(),
            None,
            "a health check of the proxy"
        );
        assert_eq!(
            of(with_rest(header(0x21, 0x31, &[0; 216]))).await.unwrap(),
            None,
            "a Unix socket"
        );
        for wrong in [
            header(0x11, 0x11, &v4),
            header(0x22, 0x11, &v4),
            header(0x21, 0x11, &v4[..3]),
            vec![b'a'; 40],
            vec![0; 3],
        ] {
            assert!(of(wrong).await.is_err());
        }
    }
}
