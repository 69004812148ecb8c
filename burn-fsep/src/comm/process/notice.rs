use std::{
    io::{self, Read},
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use super::handshake::MAGIC;

/// What the listening side answers to a hello, and what rank 0 tells the others during the rendezvous.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// The hello was accepted.
    Welcome,
    /// The hello was not.
    Refused(Refusal),
    /// Where all ranks listen, in rank order.
    Peers(Vec<SocketAddr>),
    /// All ranks are connected to each other.
    Go,
    /// The rendezvous is off: a rank was lost.
    Lost(usize),
    /// The rendezvous is off: ranks did not come.
    Missing(Vec<usize>),
}

/// Why a hello was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The listener's version.
    Version(u32),
    Token,
    /// The listener's world size.
    WorldSize(u32),
    DuplicateRank,
    /// A rank that has no business here.
    UnexpectedRank,
}

/// Bytes of an address.
const ADDRESS: usize = 18;

impl Notice {
    const HEAD: usize = MAGIC.len() + 1 + 4;

    pub fn encode(&self) -> Vec<u8> {
        let (code, number) = match self {
            Notice::Welcome => (0, 0),
            Notice::Refused(Refusal::Version(version)) => (1, *version),
            Notice::Refused(Refusal::Token) => (2, 0),
            Notice::Refused(Refusal::WorldSize(size)) => (3, *size),
            Notice::Refused(Refusal::DuplicateRank) => (4, 0),
            Notice::Refused(Refusal::UnexpectedRank) => (5, 0),
            Notice::Peers(addresses) => (6, addresses.len() as u32),
            Notice::Go => (7, 0),
            Notice::Lost(rank) => (8, *rank as u32),
            Notice::Missing(ranks) => (9, ranks.len() as u32),
        };
        let mut bytes = MAGIC.to_vec();
        bytes.push(code);
        bytes.extend_from_slice(&number.to_le_bytes());
        match self {
            Notice::Peers(addresses) => {
                for address in addresses {
                    let ip = match address.ip() {
                        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                        IpAddr::V6(ip) => ip,
                    };
                    bytes.extend_from_slice(&ip.octets());
                    bytes.extend_from_slice(&address.port().to_le_bytes());
                }
            }
            Notice::Missing(ranks) => {
                ranks.iter().for_each(|&rank| bytes.extend_from_slice(&(rank as u32).to_le_bytes()));
            }
            _ => {}
        }
        bytes
    }

    /// Reads a notice in a job of `size` ranks.
    pub fn read(reader: &mut impl Read, size: usize) -> io::Result<Self> {
        let garbled = || io::Error::new(io::ErrorKind::InvalidData, "whoever listens there is no rank of burn-fsep");
        let mut head = [0; Self::HEAD];
        reader.read_exact(&mut head)?;
        let Some([code, number @ ..]) = head.strip_prefix(&MAGIC) else { return Err(garbled()) };
        let number = u32::from_le_bytes(number.try_into().map_err(|_| garbled())?);
        let count = number as usize;
        Ok(match code {
            0 => Notice::Welcome,
            1 => Notice::Refused(Refusal::Version(number)),
            2 => Notice::Refused(Refusal::Token),
            3 => Notice::Refused(Refusal::WorldSize(number)),
            4 => Notice::Refused(Refusal::DuplicateRank),
            5 => Notice::Refused(Refusal::UnexpectedRank),
            6 if count == size => {
                let mut bytes = vec![0; count * ADDRESS];
                reader.read_exact(&mut bytes)?;
                Notice::Peers(bytes.chunks_exact(ADDRESS).map(address).collect())
            }
            7 => Notice::Go,
            8 if count < size => Notice::Lost(count),
            9 if count <= size => {
                let mut bytes = vec![0; count * 4];
                reader.read_exact(&mut bytes)?;
                let rank = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
                Notice::Missing(bytes.chunks_exact(4).map(rank).collect())
            }
            _ => return Err(garbled()),
        })
    }
}

fn address(bytes: &[u8]) -> SocketAddr {
    let mut ip = [0u8; 16];
    ip.copy_from_slice(&bytes[..16]);
    let ip = Ipv6Addr::from(ip);
    let ip = ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4);
    SocketAddr::new(ip, u16::from_le_bytes([bytes[16], bytes[17]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_are_read_as_written() {
        let addresses = vec!["127.0.0.1:5".parse().unwrap(), "[::1]:65535".parse().unwrap()];
        for notice in [
            Notice::Welcome,
            Notice::Refused(Refusal::Version(7)),
            Notice::Refused(Refusal::Token),
            Notice::Refused(Refusal::WorldSize(3)),
            Notice::Refused(Refusal::DuplicateRank),
            Notice::Refused(Refusal::UnexpectedRank),
            Notice::Peers(addresses),
            Notice::Go,
            Notice::Lost(1),
            Notice::Missing(vec![0, 1]),
        ] {
            assert_eq!(Notice::read(&mut notice.encode().as_slice(), 2).unwrap(), notice);
        }
    }

    #[test]
    fn garbled_notices_are_refused_before_anything_is_allocated() {
        let many = Notice::Missing(vec![0; 3]).encode();
        for bytes in [many, vec![b'H'; 13], Notice::Lost(2).encode()] {
            assert_eq!(Notice::read(&mut bytes.as_slice(), 2).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
