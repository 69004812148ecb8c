//! Nobody but the ranks of a job gets in, and whoever tries does no harm.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use burn_fsep::comm::{
    CommError, Communicator, Operation,
    process::{JobToken, ProcessConfig, RendezvousError},
};

const LIMIT: Duration = Duration::from_secs(10);
const OP: Operation = Operation::new("test");
/// Of what ranks say to each other.
const VERSION: u32 = 4;

fn token(text: &str) -> JobToken {
    text.parse().unwrap()
}

/// A job of `size` ranks on a port of its own.
struct Job {
    listener: TcpListener,
    size: usize,
}

impl Job {
    fn new(size: usize) -> Self {
        Self { listener: TcpListener::bind(("127.0.0.1", 0)).unwrap(), size }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    fn config(&self, rank: usize) -> ProcessConfig {
        let address = ("127.0.0.1", self.address().port());
        let config = ProcessConfig::new(rank, self.size, address, token("the secret of this test"))
            .with_rendezvous_timeout(Duration::from_secs(60));
        if rank == 0 { config.with_listener(self.listener.try_clone().unwrap()) } else { config }
    }

    /// Runs `strangers` while rank 0 waits, then starts the other ranks, and checks that all meet.
    fn meet_after(&self, strangers: impl FnOnce(SocketAddr)) {
        let member = |rank: usize| self.config(rank).run(|comm| comm.barrier(OP)).map_err(|error| (rank, error));
        std::thread::scope(|scope| {
            let host = scope.spawn(move || member(0));
            strangers(self.address());
            let others: Vec<_> = (1..self.size).map(|rank| scope.spawn(move || member(rank))).collect();
            assert_eq!(host.join().unwrap(), Ok(()));
            for other in others {
                assert_eq!(other.join().unwrap(), Ok(()));
            }
        });
    }
}

/// What every message begins with: who speaks, the version, the length of what follows.
fn message(version: u32, body: &[u8]) -> Vec<u8> {
    [b"FSEPrank".as_slice(), &version.to_le_bytes(), &(body.len() as u32).to_le_bytes(), body].concat()
}

/// The bytes of a hello: a MessagePack array of world size, rank, port and token.
fn hello(version: u32, world_size: u32, rank: u32, token: &str) -> Vec<u8> {
    let mut body = vec![0x94];
    for number in [world_size, rank] {
        body.push(0xce);
        body.extend_from_slice(&number.to_be_bytes());
    }
    body.extend_from_slice(&[0, 0xd9, token.len() as u8]);
    body.extend_from_slice(token.as_bytes());
    message(version, &body)
}

/// The body of the next message.
fn next_body(stream: &mut TcpStream) -> Vec<u8> {
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(&header[..12], &message(VERSION, &[])[..12]);
    let mut body = vec![0; u32::from_le_bytes(header[12..].try_into().unwrap()) as usize];
    stream.read_exact(&mut body).unwrap();
    body
}

/// Says something and returns the answer: empty if the connection was closed without one.
fn say(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "no answer: {error}"),
    }
    answer
}

#[test]
fn refusals_say_why_and_harm_nobody() {
    Job::new(3).meet_after(|address| {
        const SECRET: &str = "the secret of this test";
        for (what, bytes, refusal) in [
            ("another version", hello(9, 3, 1, SECRET), "Version"),
            ("another version that says other things", message(9, &[0xc1; 40]), "Version"),
            ("another token", hello(VERSION, 3, 1, "the secret of that test"), "WrongToken"),
            ("a longer token", hello(VERSION, 3, 1, "the secret of this test "), "WrongToken"),
            ("no token", hello(VERSION, 3, 1, ""), "WrongToken"),
            ("another world size", hello(VERSION, 4, 1, SECRET), "WorldSize"),
            ("a second rank 0", hello(VERSION, 3, 0, SECRET), "DuplicateRank"),
            ("a rank out of range", hello(VERSION, 3, 3, SECRET), "InvalidRank"),
            ("the largest rank", hello(VERSION, 3, u32::MAX, SECRET), "InvalidRank"),
        ] {
            let answer = say(address, &bytes);
            let body =
                answer.strip_prefix(&message(VERSION, &[])[..12]).unwrap_or_else(|| panic!("{what}: {answer:?}"));
            let text = String::from_utf8_lossy(body);
            assert!(text.contains("Failed") && text.contains(refusal), "{what}: {text}");
        }
    });
}

#[test]
fn strangers_get_no_answer_and_harm_nobody() {
    Job::new(3).meet_after(|address| {
        for (what, bytes) in [
            ("a web browser", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".to_vec()),
            ("zeros", vec![0; 4096]),
            ("megabytes", vec![0xff; 8 << 20]),
            ("an almost right start", b"FSEPrunk".to_vec()),
            ("a right start and garbage", message(VERSION, &[0xc1; 40])),
            ("a hello of 4 GiB", [&message(VERSION, &[])[..12], &[0xff; 4], &[0; 400]].concat()),
        ] {
            assert_eq!(say(address, &bytes), b"", "{what}");
        }
    });
}

#[test]
fn slow_peers_keep_nobody_waiting_and_are_dropped() {
    let mut slow = Vec::new();
    let start = Instant::now();
    Job::new(3).meet_after(|address| {
        for bytes in [b"".as_slice(), b"FSEP", b"FSEPrank\x01", &message(VERSION, &[0x94, 0x03])[..17]] {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(bytes).unwrap();
            slow.push(stream);
        }
    });
    assert!(start.elapsed() < Duration::from_secs(10), "the ranks waited for strangers");
    for mut stream in slow {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        assert!(matches!(stream.read(&mut [0; 64]), Ok(0) | Err(_)), "a stranger got an answer");
    }
}

/// Rank 0's and another process's errors, if that one is configured as `change` says.
fn refused(change: impl FnOnce(&mut ProcessConfig)) -> (RendezvousError, RendezvousError) {
    let job = Job::new(2);
    let host = job.config(0).with_rendezvous_timeout(Duration::from_secs(3));
    let mut guest = job.config(1);
    change(&mut guest);
    std::thread::scope(|scope| {
        let host = scope.spawn(move || host.init().expect_err("rank 1 is not let in"));
        let guest = guest.init().expect_err("rank 0 does not let it in");
        (host.join().unwrap(), guest)
    })
}

#[test]
fn a_rank_that_is_refused_is_told_why_and_rank_0_who_is_missing() {
    let (host, guest) = refused(|config| config.token = token("another secret than that"));
    assert_eq!(guest, RendezvousError::WrongToken);
    assert!(matches!(&host, RendezvousError::Missing { missing, .. } if *missing == [1]), "{host}");
    assert!(host.to_string().contains("a wrong job token"), "{host}");

    let (host, guest) = refused(|config| (config.rank, config.world_size) = (2, 3));
    assert_eq!(guest, RendezvousError::WorldSize { ours: 3, theirs: 2 });
    assert!(host.to_string().contains("rank 2 of 3 ranks, this one expects 2"), "{host}");
}

#[test]
fn a_second_process_of_one_rank_is_told_and_the_first_goes_on() {
    let job = Job::new(3);
    let ranks = |rank: usize| job.config(rank).run(|comm| comm.barrier(OP));
    std::thread::scope(|scope| {
        let first: Vec<_> = [0, 1].map(|rank| scope.spawn(move || ranks(rank))).into();
        // Two processes say that they are rank 1; whoever comes first, one of them is told.
        let second = scope.spawn(move || ranks(1));
        let mut early = first.into_iter();
        let host = early.next().unwrap();
        let pair = [early.next().unwrap(), second];
        while pair.iter().all(|process| !process.is_finished()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let last = scope.spawn(move || ranks(2));
        assert_eq!(host.join().unwrap(), Ok(()));
        assert_eq!(last.join().unwrap(), Ok(()));
        let mut results = pair.map(|process| process.join().unwrap());
        results.sort_by_key(Result::is_err);
        let duplicate = CommError::Rendezvous(RendezvousError::DuplicateRank { rank: 1 });
        assert_eq!(results, [Ok(()), Err(duplicate)]);
    });
}

#[test]
fn configurations_that_cannot_be_are_refused_at_once() {
    let config = |rank, size, host: &str| ProcessConfig::new(rank, size, (host, 1), token("the secret of this test"));
    for (rank, size) in [(2, 2), (0, 0), (0, 1_000_000)] {
        let error = config(rank, size, "127.0.0.1").init().unwrap_err();
        assert!(matches!(error, RendezvousError::InvalidRank { .. }), "{error}");
    }
    // TEST-NET-1: no machine here has this address.
    let error = config(0, 2, "192.0.2.1").init().unwrap_err();
    assert!(matches!(error, RendezvousError::Bind { .. }) && error.to_string().contains("MASTER_ADDR"), "{error}");
    let error = config(0, 2, "no such host").init().unwrap_err();
    assert!(matches!(error, RendezvousError::Address { .. }) && error.to_string().contains("no such host"), "{error}");
}

#[test]
fn one_rank_needs_no_network() {
    let config = ProcessConfig::new(0, 1, ("no such host", 1), token("the secret of this test"));
    let comm = config.init().unwrap();
    comm.barrier(OP).unwrap();
    assert_eq!((comm.rank(), comm.size()), (0, 1));
}

#[test]
fn a_member_that_sends_garbage_ends_the_group_with_an_error() {
    // A rank 1 that keeps to the protocol until all are connected.
    // A frame is an enum's variant of the collective's key, its description and the lengths of its blocks.
    let frame = |signature: &[u8], blocks: &[u8]| {
        message(VERSION, &[&[0x81, 0xa5][..], b"Frame", &[0x93, 0x92, 0, 0], signature, blocks].concat())
    };
    for (what, bytes) in [
        ("garbage", vec![0x47; 64]),
        ("a frame of 2^63 bytes", frame(b"\xa0", &[&[0x91, 0xcf][..], &(1u64 << 63).to_be_bytes()].concat())),
        ("a description of 4 GiB", frame(&[0xdb, 0xff, 0xff, 0xff, 0xff], &[0; 64])),
        ("a message of 4 GiB", [&message(VERSION, &[])[..12], &[0xff; 4], &[0; 64]].concat()),
    ] {
        let job = Job::new(2);
        let (config, address) = (job.config(0), job.address());
        std::thread::scope(|scope| {
            let host = scope.spawn(move || config.run(|comm| comm.barrier(OP)));
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(&hello(VERSION, 2, 1, "the secret of this test")).unwrap();
            // Welcome, the table of addresses; then "ready", and "go".
            assert!(next_body(&mut stream).ends_with(b"Welcome"));
            next_body(&mut stream);
            stream.write_all(b"R").unwrap();
            assert!(next_body(&mut stream).ends_with(b"Go"));
            stream.write_all(&bytes).unwrap();
            let error = host.join().unwrap().unwrap_err();
            assert!(matches!(error, CommError::PeerFailed { rank: 1, .. }), "{what}: {error}");
            assert!(error.to_string().contains("no message of this engine"), "{what}: {error}");
        });
    }
}

#[test]
fn a_rank_that_goes_on_learns_from_one_that_does_not_who_was_lost() {
    let job = Job::new(3);
    // This test is rank 0, which is lost after it has told rank 1 to go, and before it tells rank 2.
    let (listener, job) = (job.listener.try_clone().unwrap(), &job);
    std::thread::scope(|scope| {
        let [first, second] = [1, 2].map(|rank| scope.spawn(move || job.config(rank).run(|comm| comm.barrier(OP))));
        let mut members = [(); 2].map(|()| {
            let mut stream = listener.accept().unwrap().0;
            let hello = next_body(&mut stream);
            stream.write_all(&message(VERSION, b"\xa7Welcome")).unwrap();
            // The array's mark, the world size, the rank, a number of two bytes.
            (hello[2], [hello[4], hello[5]], stream)
        });
        members.sort_by_key(|member| member.0);
        let address = |port: [u8; 2]| [b"\x81\xa2V4\x92\x94\x7f\x00\x00\x01\xcd".as_slice(), &port].concat();
        let addresses = [[0, 1], members[0].1, members[1].1].map(address).concat();
        let peers = message(VERSION, &[b"\x81\xa5Peers\x93".as_slice(), &addresses].concat());
        let mut streams = members.map(|member| member.2);
        streams.iter_mut().for_each(|stream| stream.write_all(&peers).unwrap());
        streams.iter_mut().for_each(|stream| stream.read_exact(&mut [0]).unwrap());
        let [mut to_first, to_second] = streams;
        to_first.write_all(&message(VERSION, b"\xa2Go")).unwrap();
        drop(to_second);
        let error = second.join().unwrap().unwrap_err();
        assert!(matches!(error, CommError::Rendezvous(RendezvousError::Lost { rank: 0, .. })), "{error}");
        let error = first.join().unwrap().unwrap_err();
        assert!(matches!(error, CommError::PeerFailed { rank: 0, lost: true, .. }), "{error}");
    });
}

/// A rank that nobody answers gives up after five seconds and comes again; who listened all the while finds both connections.
#[test]
fn a_first_rank_that_looks_late_finds_the_others() {
    let job = Job::new(2);
    let member = |rank: usize| job.config(rank).run(|comm| comm.barrier(OP)).map_err(|error| error.to_string());
    std::thread::scope(|scope| {
        let other = scope.spawn(move || member(1));
        std::thread::sleep(Duration::from_secs(6));
        assert_eq!(member(0), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
    });
}
