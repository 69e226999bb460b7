// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControlDefaultAdminRules} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Address} from "@openzeppelin/contracts/utils/Address.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {IVault} from "./interfaces/IVault.sol";

contract Vault is IVault, AccessControlDefaultAdminRules, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    bytes32 public constant TOKEN_ADMIN = keccak256("TOKEN_ADMIN");
    bytes32 public constant GUARDIAN = keccak256("GUARDIAN");
    address private constant NATIVE = address(0);

    address private immutable _deployer;

    /// @inheritdoc IVault
    bool public isSealed;
    /// @inheritdoc IVault
    bool public paused;
    /// @inheritdoc IVault
    mapping(address token => mapping(address account => uint256)) public balanceOf;
    /// @inheritdoc IVault
    mapping(address token => uint256) public liabilities;
    /// @inheritdoc IVault
    mapping(address module => mapping(address token => uint256)) public lockedBy;
    /// @inheritdoc IVault
    mapping(address account => bool) public isModule;
    /// @inheritdoc IVault
    mapping(address token => bool) public isTokenAllowed;

    modifier onlyModule() {
        if (!isModule[msg.sender]) revert Vault_NotModule(msg.sender);
        _;
    }

    /// @param admin First holder of the admin, TOKEN_ADMIN and GUARDIAN roles; it hands the last two on.
    /// @param adminDelay Seconds that a change of the admin must wait.
    constructor(address admin, uint48 adminDelay) AccessControlDefaultAdminRules(adminDelay, admin) {
        _deployer = msg.sender;
        _grantRole(TOKEN_ADMIN, admin);
        _grantRole(GUARDIAN, admin);
    }

    /// @inheritdoc IVault
    function deposit(address token, uint256 amount, address beneficiary)
        external
        payable
        nonReentrant
        returns (uint256 credited)
    {
        if (!isSealed) revert Vault_NotSealed();
        if (paused) revert Vault_Paused();
        if (!isTokenAllowed[token]) revert Vault_TokenNotAllowed(token);
        if (beneficiary == address(0)) revert Vault_ZeroAddress();
        uint256 expected = token == NATIVE ? amount : 0;
        if (msg.value != expected) revert Vault_WrongValue(expected, msg.value);

        // The transfer comes first here: what is credited is what it brought. The guard keeps callbacks out.
        credited = token == NATIVE ? amount : _pull(IERC20(token), amount);
        if (credited == 0) revert Vault_ZeroAmount();

        balanceOf[token][beneficiary] += credited;
        liabilities[token] += credited;

        emit Deposited(token, msg.sender, beneficiary, credited);
    }

    /// @inheritdoc IVault
    function withdraw(address token, uint256 amount, address to) external nonReentrant {
        if (to == address(0) || to == address(this)) revert Vault_BadRecipient(to);
        if (amount == 0) revert Vault_ZeroAmount();

        _debit(token, msg.sender, amount);
        liabilities[token] -= amount;

        emit Withdrawn(token, msg.sender, to, amount);

        if (token == NATIVE) Address.sendValue(payable(to), amount);
        else IERC20(token).safeTransfer(to, amount);
    }

    /// @inheritdoc IVault
    function lock(address token, address from, uint256 amount) external onlyModule {
        if (paused) revert Vault_Paused();

        _debit(token, from, amount);
        lockedBy[msg.sender][token] += amount;

        emit Locked(msg.sender, token, from, amount);
    }

    /// @inheritdoc IVault
    function release(address token, address to, uint256 amount) external onlyModule {
        uint256 locked = lockedBy[msg.sender][token];
        if (amount > locked) revert Vault_ReleaseExceedsLocked(msg.sender, token, locked, amount);

        lockedBy[msg.sender][token] = locked - amount;
        balanceOf[token][to] += amount;

        emit Released(msg.sender, token, to, amount);
    }

    /// @inheritdoc IVault
    function seal(address[] calldata modules) external {
        if (msg.sender != _deployer) revert Vault_NotDeployer(msg.sender);
        if (isSealed) revert Vault_AlreadySealed();

        isSealed = true;
        for (uint256 i = 0; i < modules.length; ++i) {
            if (modules[i].code.length == 0) revert Vault_NotAContract(modules[i]);
            isModule[modules[i]] = true;
        }

        emit Sealed(modules);
    }

    /// @inheritdoc IVault
    function setToken(address token, bool allowed) external onlyRole(TOKEN_ADMIN) {
        isTokenAllowed[token] = allowed;
        emit TokenSet(token, allowed);
    }

    /// @inheritdoc IVault
    function setPaused(bool paused_) external onlyRole(GUARDIAN) {
        paused = paused_;
        emit PausedSet(msg.sender, paused_);
    }

    function _debit(address token, address account, uint256 amount) private {
        uint256 balance = balanceOf[token][account];
        if (amount > balance) revert Vault_Insufficient(token, account, balance, amount);
        balanceOf[token][account] = balance - amount;
    }

    function _pull(IERC20 token, uint256 amount) private returns (uint256) {
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), amount);
        return token.balanceOf(address(this)) - before;
    }
}
