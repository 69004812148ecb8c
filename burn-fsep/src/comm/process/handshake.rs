use std::{
    io::{self, ErrorKind, Read},
    net::SocketAddr,
};

use serde::{Deserialize, Serialize};

use super::{JobToken, RendezvousError, wire};

/// What a rank says first on a connection. Not to be printed: it holds the job's secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub world_size: u32,
    pub rank: u32,
    /// Where this rank listens for its peers; 0 if it does not.
    pub port: u16,
    pub token: String,
}

impl Hello {
    /// Longest one.
    pub const LIMIT: usize = 128;

    pub fn new(rank: usize, world_size: usize, port: u16, token: &JobToken) -> Self {
        Self { world_size: world_size as u32, rank: rank as u32, port, token: token.reveal() }
    }
}

/// What the listening side answers to a hello, and what rank 0 tells the others during the rendezvous.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Notice {
    /// The hello was accepted.
    Welcome,
    /// The hello was not, or the rendezvous is off: the error of who hears it.
    Failed(RendezvousError),
    /// Where all ranks listen, in rank order.
    Peers(Vec<SocketAddr>),
    /// All ranks are connected to each other.
    Go,
}

impl Notice {
    /// Bytes of the longest one: the table of addresses, or an error with its texts and ranks.
    fn limit(size: usize) -> usize {
        64 * size + 1024
    }

    /// Reads a notice in a job of `size` ranks.
    pub fn read(reader: &mut impl Read, size: usize) -> io::Result<Self> {
        let garbled = || io::Error::new(ErrorKind::InvalidData, "whoever listens there is no rank of burn-fsep");
        let notice = match wire::read(reader, Self::limit(size)) {
            Ok(notice) => notice.ok_or(ErrorKind::UnexpectedEof)?,
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(garbled()),
            Err(error) => return Err(error),
        };
        match &notice {
            Notice::Peers(addresses) if addresses.len() != size => Err(garbled()),
            _ => Ok(notice),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn missing(missing: Vec<usize>) -> RendezvousError {
        RendezvousError::Missing { missing, waited: Duration::from_secs(1), refused: Some("a wrong job token.".into()) }
    }

    #[test]
    fn a_hello_is_read_as_written() {
        let hello = Hello::new(3, 70_000, 65_535, &JobToken::random().unwrap());
        let bytes = wire::encode(&hello);
        assert_eq!(wire::header(&bytes).unwrap(), Some((wire::VERSION, bytes.len() - wire::HEADER)));
        assert!(wire::decode::<Hello>(&bytes[wire::HEADER..]).unwrap() == hello);
        let longest = Hello::new(usize::MAX, usize::MAX, u16::MAX, &"x".repeat(64).parse().unwrap());
        assert!(wire::encode(&longest).len() <= wire::HEADER + Hello::LIMIT);
    }

    #[test]
    fn anything_else_is_no_hello() {
        assert!(wire::header(b"G").is_err() && wire::header(b"FSEPrunk and more").is_err());
        assert_eq!(wire::header(b"FSEPrank and").unwrap(), None);
        assert!(wire::decode::<Hello>(&[b'G'; 80]).is_err());
    }

    #[test]
    fn notices_are_read_as_written() {
        let addresses = vec!["127.0.0.1:5".parse().unwrap(), "[::1]:65535".parse().unwrap()];
        for notice in [
            Notice::Welcome,
            Notice::Failed(RendezvousError::Version { ours: 7, theirs: u32::MAX }),
            Notice::Failed(RendezvousError::WrongToken),
            Notice::Failed(RendezvousError::WorldSize { ours: usize::MAX, theirs: usize::MAX }),
            Notice::Failed(RendezvousError::DuplicateRank { rank: usize::MAX }),
            Notice::Failed(RendezvousError::InvalidRank { rank: usize::MAX, world_size: usize::MAX, max: usize::MAX }),
            Notice::Peers(addresses),
            Notice::Go,
            Notice::Failed(missing(vec![0, 1])),
        ] {
            assert_eq!(Notice::read(&mut wire::encode(&notice).as_slice(), 2).unwrap(), notice);
        }
    }

    #[test]
    fn garbled_notices_are_refused_before_anything_is_allocated() {
        let mut long = wire::encode(&Notice::Go);
        long[wire::HEADER - 4..wire::HEADER].copy_from_slice(&u32::MAX.to_le_bytes());
        let too_many = wire::encode(&Notice::Failed(missing(vec![0; 2000])));
        for bytes in [long, too_many, vec![b'H'; 21], wire::encode(&7)] {
            assert_eq!(Notice::read(&mut bytes.as_slice(), 2).unwrap_err().kind(), ErrorKind::InvalidData);
        }
        for (size, addresses) in [(1, 2), (3, 2)] {
            let peers = Notice::Peers(vec!["127.0.0.1:5".parse().unwrap(); addresses]);
            assert!(Notice::read(&mut wire::encode(&peers).as_slice(), size).is_err());
        }
    }

    #[test]
    fn what_concerns_all_ranks_of_a_large_job_fits() {
        let size = 1024;
        let address = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap();
        for notice in [Notice::Peers(vec![address; size]), Notice::Failed(missing((1..size).collect()))] {
            assert_eq!(Notice::read(&mut wire::encode(&notice).as_slice(), size).unwrap(), notice);
        }
    }
}
