//! Joining, renewing, revoking.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn cause<T: std::fmt::Debug>(result: Result<T, ClusterError>) -> String {
    let error = result.unwrap_err();
    assert!(!error.mend().is_empty(), "{error}: no mend");
    format!("{error}; {}", error.mend())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_takes_in_one_node_in_its_time_and_who_is_refused_is_told_why() {
    let vm1 = Node::start("vm1", &[], "").await;
    let vm2 = Node::start("vm2", &[("vm1", vm1.address)], "").await;
    let vm3 = Node::start("vm3", &[("vm1", vm1.address)], "").await;
    assert!(cause(vm1.peers.token(None, &[]).await).contains("in no cluster yet"));
    assert!(cause(vm1.peers.init("C!").await).contains("\"C!\" cannot be a name"));
    vm1.peers.init("c").await.unwrap();
    vm1.listening().await;
    assert!(cause(vm1.peers.init("d").await).contains("in the cluster \"c\" already, as vm1"));
    let days = Some(Duration::from_hours(48));
    assert!(cause(vm1.peers.token(days, &[]).await).contains("at most 1day"));

    let made = vm1.peers.token(None, &[]).await.unwrap();
    assert_eq!((made.cluster.as_str(), &made.addresses), ("c", &vec![vm1.address]));
    assert!(cause(vm2.peers.join("rubbish").await).contains("does not begin with"));
    let slip = if &made.token[20..21] == "A" { "B" } else { "A" };
    let mistyped = [&made.token[..20], slip, &made.token[21..]].concat();
    assert!(cause(vm2.peers.join(&mistyped).await).contains("cut short or mistyped"));
    vm2.peers.join(&made.token).await.unwrap();
    vm1.event(|kind| matches!(kind, Kind::PeerJoined { peer, .. } if peer == "vm2")).await;
    vm1.up("vm2").await;
    assert!(cause(vm2.peers.join(&made.token).await).contains("already, as vm2"));
    // Used: the port takes in nobody without a certificate any more.
    let used = cause(vm3.peers.join(&made.token).await);
    assert!(used.contains("used already") && used.contains("ftctl cluster token"), "{used}");
    // While another one is open, the cause is told by who knows it.
    let other = vm1.peers.token(None, &[]).await.unwrap();
    let used = cause(vm3.peers.join(&made.token).await);
    assert!(used.contains("vm2 has used it"), "{used}");
    vm1.refused("vm2 has used it").await;
    // Under another node's name.
    let false_vm2 = Node::start("vm2", &[("vm1", vm1.address)], "").await;
    let taken = cause(false_vm2.peers.join(&other.token).await);
    assert!(taken.contains("vm2 is in the cluster already") && taken.contains("revoke vm2"), "{taken}");
    // Refused, so not used up.
    vm3.peers.join(&other.token).await.unwrap();
    vm1.up("vm3").await;

    let short = vm1.peers.token(Some(Duration::from_secs(1)), &[]).await.unwrap();
    let vm4 = Node::start("vm4", &[("vm1", vm1.address)], "").await;
    sleep(Duration::from_millis(1500)).await;
    let expired = cause(vm4.peers.join(&short.token).await);
    assert!(expired.contains("expired, at"), "{expired}");
    assert!(!vm4.dir.path().join("cluster/identity.json").exists());
    // A token of another cluster, whose address is that of this one.
    let other = Node::start("vm1", &[], "").await;
    other.peers.init("other").await.unwrap();
    let _open = vm1.peers.token(None, &[]).await.unwrap();
    let foreign = other.peers.token(None, &[vm1.address]).await.unwrap();
    let foreign = cause(vm4.peers.join(&foreign.token).await);
    assert!(foreign.contains("not of the token's cluster"), "{foreign}");
    // Only the node with the CA takes in.
    assert!(cause(vm2.peers.token(None, &[]).await).contains("not on this node but on vm1"));
    assert!(cause(vm2.peers.revoke("vm3").await).contains("on vm1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_good_after_a_restart_and_the_door_is_closed_when_it_ends() {
    let vm1 = Node::start("vm1", &[], "").await;
    vm1.peers.init("c").await.unwrap();
    vm1.listening().await;
    let made = vm1.peers.token(Some(Duration::from_secs(5)), &[]).await.unwrap();
    let (address, dir) = vm1.stop().await;
    let vm1 = Node::start_at("vm1", address, &[], "", dir).await;
    vm1.listening().await;
    let stranger = strangers::Raw::new(None, tls::JOIN, &vm1);
    let vm2 = Node::start("vm2", &[("vm1", vm1.address)], "").await;
    assert!(stranger.connect(&vm1).await.is_ok(), "it is open");
    sleep(Duration::from_secs(6)).await;
    let late = cause(vm2.peers.join(&made.token).await);
    assert!(late.contains("expired, at"), "{late}");
    // Not even a handshake.
    let closed = stranger.turned_away(&vm1).await;
    assert!(closed.contains("120") || closed.contains("application protocol"), "{closed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_for_their_owner_alone_and_a_token_is_not_stored() {
    let (vm1, vm2) = pair("").await;
    let token = vm1.peers.token(None, &[]).await.unwrap().token;
    let secret = Token::parse(&token).unwrap().secret;
    for node in [&vm1, &vm2] {
        let dir = node.dir.path().join("cluster");
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        for file in std::fs::read_dir(&dir).unwrap() {
            let file = file.unwrap();
            assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
            let content = std::fs::read(file.path()).unwrap();
            let hex = data_encoding::HEXLOWER.encode(&secret);
            assert!(!content.windows(32).any(|window| window == secret));
            assert!(!String::from_utf8_lossy(&content).contains(&hex));
        }
    }
    assert!(!vm2.dir.path().join("cluster/authority.json").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_revoked_is_cut_off_kept_out_and_may_join_again() {
    let (vm1, vm2) = pair("").await;
    let vm3 = Node::start("vm3", &[("vm1", vm1.address), ("vm2", vm2.address)], "").await;
    vm3.peers.join(&vm1.peers.token(None, &[]).await.unwrap().token).await.unwrap();
    vm1.up("vm3").await;
    vm2.up("vm3").await;
    let unknown = vm1.peers.revoke("vm7").await.unwrap_err();
    assert!(unknown.to_string().contains("there are: vm1, vm2, vm3"), "{unknown}");
    assert!(vm1.peers.revoke("vm1").await.unwrap_err().to_string().contains("itself"));

    vm1.peers.revoke("vm3").await.unwrap();
    vm1.event(|kind| matches!(kind, Kind::PeerRevoked { peer } if peer == "vm3")).await;
    // On the node with the CA, and, by its list, on the other.
    for node in [&vm1, &vm2] {
        let down = node.event(|kind| matches!(kind, Kind::PeerDown { peer, .. } if peer == "vm3")).await;
        assert!(matches!(&down.kind, Kind::PeerDown { cause, .. } if cause.contains("revoked")), "{down:?}");
        // It tries again, and is not let in.
        node.refused("its certificate was revoked").await;
    }
    let mend = vm3.refused("was revoked").await;
    assert!(mend.contains("ftctl cluster join"), "{mend}");
    assert!(vm1.echo("vm3", "a").await.is_err() && vm3.echo("vm1", "a").await.is_err());
    assert!(vm1.echo("vm2", "a").await.is_ok());

    // It is remembered.
    let (address, dir) = vm2.stop().await;
    let vm2 = Node::start_at("vm2", address, &[("vm1", vm1.address)], "", dir).await;
    vm2.connected("vm1").await;
    assert!(vm2.peers.core.list_number() >= 2);

    // With a new identity it is welcome.
    let (address, dir) = vm3.stop().await;
    std::fs::remove_dir_all(dir.path().join("cluster")).unwrap();
    let vm3 = Node::start_at("vm3", address, &[("vm1", vm1.address)], "", dir).await;
    vm3.peers.join(&vm1.peers.token(None, &[]).await.unwrap().token).await.unwrap();
    vm3.connected("vm1").await;
    vm1.connected("vm3").await;
    assert!(vm3.echo("vm1", "a").await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_and_no_request_is_lost_by_it() {
    // Each certificate lives for a minute, and is renewed after two seconds.
    let (vm1, vm2) = pair("certificate_for = \"60s\"\nrenew_before = \"58s\"\n").await;
    let first = vm2.peers.status().certificate.unwrap();
    let end = Instant::now() + LIMIT;
    let (mut asked, mut renewals) = (0, 0);
    while renewals < 2 {
        assert!(Instant::now() < end, "{:#?}", vm2.told());
        let slow = Echo { text: "a".into(), after: 20 };
        let (there, back) = tokio::join!(vm1.peers.call("vm2", &slow), vm2.peers.call("vm1", &slow));
        there.unwrap_or_else(|error| panic!("after {asked}: {error}"));
        back.unwrap_or_else(|error| panic!("after {asked}: {error}"));
        asked += 1;
        let told = vm2.told();
        renewals = told.iter().filter(|kind| matches!(kind, Kind::CertificateRenewed { .. })).count();
    }
    let now = vm2.peers.status().certificate.unwrap();
    assert!(now.until > first.until && now.serial != first.serial);
    // The other side is shown the new one.
    vm1.until("the new certificate", |status| {
        status.peers[0].certificate.as_ref().is_some_and(|shown| shown.until > first.until)
    })
    .await;
    assert!(vm1.answered.load(Ordering::Relaxed) >= asked);
    for node in [&vm1, &vm2] {
        assert!(!node.told().iter().any(|kind| matches!(kind, Kind::PeerDown { .. })), "{:#?}", node.told());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_ends_ends_the_connection() {
    let (vm1, vm2) = pair("").await;
    let (address, dir) = vm2.stop().await;
    // Issued 90 days but three seconds ago, and never renewed.
    let mut authority = Authority::load(&vm1.dir.path().join("cluster")).unwrap().unwrap();
    let old = vm1.peers.core.settings.certificate_for.checked_sub(Duration::from_secs(4)).unwrap();
    let then = jiff::Timestamp::now().checked_sub(old).unwrap();
    let wish = identity_of("vm2");
    let request = wish.request().unwrap();
    let issue = authority.renew("vm2", &request, &vm1.peers.core.settings, then).unwrap();
    wish.fulfilled(issue).unwrap().save(&dir.path().join("cluster")).unwrap();
    // The node with the CA does not answer requests for new ones.
    vm1.peers.core.services.write().unwrap().remove(&service::RENEW);
    let vm2 = Node::start_at("vm2", address, &[("vm1", vm1.address)], "", dir).await;
    vm2.up("vm1").await;
    vm2.event(|kind| matches!(kind, Kind::CertificateTrouble { .. })).await;
    vm2.event(|kind| matches!(kind, Kind::PeerDown { .. })).await;
    vm1.refused("its certificate has ended").await;
    vm2.refused("this node's certificate has ended").await;
    assert!(vm1.echo("vm2", "a").await.is_err());
}

fn identity_of(name: &str) -> super::super::identity::Wish {
    super::super::identity::Wish::new(name).unwrap()
}

#[test]
fn whenever_a_node_is_killed_it_is_in_a_cluster_or_not() {
    let settings = Cluster::default();
    let (dir, now) = (tempfile::tempdir().unwrap(), jiff::Timestamp::now());
    let dir = dir.path().join("cluster");
    // Killed after the CA was stored, before the identity was.
    let (mut authority, identity, list) = Authority::make(&dir, "c", "vm1", &settings, now).unwrap();
    assert!(Identity::load(&dir).unwrap().is_none());
    // The next attempt starts anew.
    let (other, _, _) = Authority::make(&dir, "c", "vm1", &settings, now).unwrap();
    assert_ne!(authority.fingerprint().unwrap(), other.fingerprint().unwrap());
    x509::revoked(&list, &identity.authority().unwrap()).unwrap();
    // Another CA's list is none.
    let other = x509::revoked(&list, &pem_of(&other)).unwrap_err();
    assert!(other.contains("another CA's"), "{other}");

    // A token that was used is used, whatever comes after; one whose disk is full is not.
    let secret = authority.open(now.checked_add(Duration::from_mins(1)).unwrap(), now).unwrap();
    let wish = identity_of("vm2");
    let request = wish.request().unwrap();
    std::fs::create_dir(dir.join("authority.new")).unwrap();
    let full = authority.take_in(&secret, "vm2", &request, &settings, now).unwrap_err();
    assert!(matches!(full, ClusterError::Disk { .. }), "{full}");
    std::fs::remove_dir(dir.join("authority.new")).unwrap();
    authority.take_in(&secret, "vm2", &request, &settings, now).unwrap();
    let mut again = Authority::load(&dir).unwrap().unwrap();
    let used = again.take_in(&secret, "vm3", &request, &settings, now).unwrap_err();
    assert!(used.to_string().contains("vm2 has used it"), "{used}");
    // It never said that it had it: it may come again, and what was issued first is revoked.
    let secret = again.open(now.checked_add(Duration::from_mins(1)).unwrap(), now).unwrap();
    let issue = again.take_in(&secret, "vm2", &request, &settings, now).unwrap();
    let authority = super::super::identity::pem(&issue.authority).unwrap();
    let read = x509::revoked(&issue.revoked, &authority).unwrap();
    assert_eq!((read.number, read.serials.len()), (2, 1));
    let identity = wish.fulfilled(issue).unwrap();
    assert!(!read.serials.contains(&identity.facts().unwrap().serial));
    identity.save(&dir).unwrap();
    assert_eq!(Identity::load(&dir).unwrap().unwrap().node, "vm2");
}

fn pem_of(authority: &Authority) -> Vec<u8> {
    authority.certificate().unwrap().to_vec()
}

#[test]
fn a_certificate_is_for_what_was_issued_and_clocks_may_differ() {
    // Certificates have whole seconds.
    let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let settings = Cluster::default();
    let (mut authority, identity, _) = Authority::make(dir.path(), "c", "vm1", &settings, now).unwrap();
    let facts = identity.facts().unwrap();
    let seconds = |a: jiff::Timestamp, b: jiff::Timestamp| a.duration_since(b).as_secs();
    assert_eq!((facts.name.as_str(), seconds(now, facts.from)), ("vm1", 300));
    assert_eq!(seconds(facts.until, now), 90 * 86400);
    // What a request asks for besides a key does not count: here, to be somebody else, and a CA.
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["vm1".into(), "vm9".into()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = params.serialize_request(&key).unwrap().der().clone();
    let issue = authority.renew("vm2", &request, &settings, now).unwrap();
    let certificate = super::super::identity::pem(&issue.certificate).unwrap();
    assert_eq!(x509::facts(&certificate).unwrap().name, "vm2");
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
    assert!(!parsed.is_ca());
    // A request that was changed on the way, and rubbish.
    let mut changed = request.to_vec();
    let last = changed.len() - 1;
    changed[last] ^= 1;
    for bytes in [changed, b"rubbish".to_vec(), Vec::new()] {
        let bytes = CertificateSigningRequestDer::from(bytes);
        let error = authority.renew("vm2", &bytes, &settings, now).unwrap_err();
        assert!(matches!(error, ClusterError::Request { .. }), "{error}");
    }
}

#[tokio::test]
async fn an_identity_that_is_damaged_or_another_nodes_is_told_and_not_used() {
    let vm1 = Node::start("vm1", &[], "").await;
    vm1.peers.init("c").await.unwrap();
    vm1.listening().await;
    let (address, dir) = vm1.stop().await;
    let vm5 = Node::start_at("vm5", address, &[], "", dir).await;
    let told = vm5.event(|kind| matches!(kind, Kind::PeersBlocked { .. })).await;
    assert!(
        matches!(&told.kind, Kind::PeersBlocked { cause, .. } if cause.contains("its certificate is for vm1")),
        "{told:?}"
    );
    let path = vm5.dir.path().join("cluster/identity.json");
    let whole = std::fs::read_to_string(&path).unwrap();
    let key = whole.find("PRIVATE KEY").unwrap() + 60;
    let mut other_key = whole.clone().into_bytes();
    other_key[key] = if other_key[key] == b'A' { b'B' } else { b'A' };
    let dir = vm5.dir;
    for bytes in [b"{".to_vec(), whole.as_bytes()[..whole.len() / 2].to_vec(), other_key] {
        std::fs::write(&path, bytes).unwrap();
        let error = Identity::load(&dir.path().join("cluster")).unwrap_err();
        assert!(!error.mend().is_empty(), "{error}");
    }
}
