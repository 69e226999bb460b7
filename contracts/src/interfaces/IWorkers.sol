// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Registry of workers: who owns a hot key and where its earnings go
/// @notice The hot key lives on the worker's machine and is its peer identity; the owner is cold. Earnings of a hot key
/// are paid to its payout address, so a stolen machine can not take them.
interface IWorkers {
    /// @param owner Cold account; zero when the key was never registered.
    /// @param active False after `revoke` or when `rotate` replaced the key.
    /// @param payout Where `Channels.settle` pays this key's earnings, before and after retirement.
    /// @param nonce Number of consents used; the next consent must carry it.
    struct Worker {
        address owner;
        bool active;
        address payout;
        uint256 nonce;
    }

    error Workers_ZeroAddress();
    error Workers_Expired(uint40 deadline, uint256 now_);
    error Workers_HotKeyTaken(address hotKey, address owner);
    error Workers_NotOwner(address hotKey, address caller);
    error Workers_NotActive(address hotKey);
    error Workers_BadSignature(address hotKey);

    event Registered(address indexed hotKey, address indexed owner, address indexed payout);
    event PayoutSet(address indexed hotKey, address previous, address indexed payout);
    event Revoked(address indexed hotKey, address indexed owner);
    event Rotated(address indexed previous, address indexed hotKey, address indexed owner);

    /// @notice Registers `hotKey` as a worker of the caller. Also brings back a key the caller had retired.
    /// Warning: a key once registered belongs to that owner for ever, so that whoever steals a retired key can not
    /// redirect what it is still owed.
    /// @param signature By `hotKey` over HotKey{owner: caller, hotKey, payout, nonce, deadline}.
    function register(address hotKey, address payout, uint40 deadline, bytes calldata signature) external;

    /// @notice Owner only, for active and retired keys: where earnings of `hotKey` go from now on.
    function setPayout(address hotKey, address payout) external;

    /// @notice Owner only: retires `hotKey` and registers `newHotKey` with the same payout.
    /// @param signature By `newHotKey`, as for `register`, over the payout of `hotKey`.
    function rotate(address hotKey, address newHotKey, uint40 deadline, bytes calldata signature) external;

    /// @notice Owner only: retires `hotKey`. Its payout address stays.
    function revoke(address hotKey) external;

    /// @notice Where earnings of `hotKey` are paid: its payout address, or the key itself when it was never registered.
    function payoutOf(address hotKey) external view returns (address);

    /// @notice Owner of an active or retired key; zero when it was never registered.
    function ownerOf(address hotKey) external view returns (address);

    function isActive(address hotKey) external view returns (bool);

    function worker(address hotKey) external view returns (Worker memory);

    function domainSeparator() external view returns (bytes32);

    /// @notice The digest a hot key signs to consent.
    function hotKeyDigest(address owner, address hotKey, address payout, uint256 nonce, uint40 deadline)
        external
        view
        returns (bytes32);
}
