//! One service, different unit names on different distributions: `httpd` is `apache2` on Debian.
//!
//! These are tried only when systemd itself does not know the name that was asked for; an alias that
//! a unit file declares (`Alias=`) is systemd's own business.

const SAME: [&[&str]; 6] = [
    &["apache2.service", "httpd.service"],
    &["mariadb.service", "mysql.service", "mysqld.service"],
    &["named.service", "bind9.service"],
    &["redis-server.service", "redis.service"],
    &["ssh.service", "sshd.service"],
    &["cron.service", "crond.service"],
];

/// Other names under which distributions know the unit `name`.
pub fn others(name: &str) -> impl Iterator<Item = &'static str> {
    let names = SAME.iter().find(|names| names.contains(&name)).copied().unwrap_or_default();
    names.iter().copied().filter(move |other| *other != name)
}

#[cfg(test)]
mod tests {
    use super::others;

    #[test]
    fn httpd_is_apache2_and_the_other_way_round() {
        assert_eq!(others("httpd.service").collect::<Vec<_>>(), ["apache2.service"]);
        assert_eq!(others("apache2.service").collect::<Vec<_>>(), ["httpd.service"]);
        assert_eq!(others("nginx.service").count(), 0);
    }
}
